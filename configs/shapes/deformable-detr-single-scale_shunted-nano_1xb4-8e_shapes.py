# One map, the backbone's last with stride 16; learned queries, no box refinement.
_base_ = './deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
model = dict(
    num_feature_levels=1,
    as_two_stage=False,
    with_box_refine=False,
    backbone=dict(
        arch=dict(
            embed_dims=(32, 64, 128), depths=(2, 2, 2), num_heads=(2, 2, 4), mlp_ratios=(4, 4, 4), sr_ratios=(8, 4, 2)
        ),
        out_indices=(2,),
    ),
    neck=dict(in_channels=[128], num_outs=1),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=1))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=1))),
)

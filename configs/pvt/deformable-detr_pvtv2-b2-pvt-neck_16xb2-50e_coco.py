# Deformable DETR on PVTv2-B2, with a pyramid fused by spatial-reduction attention.
_base_ = '../deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        out_indices=(1, 2, 3),
        init_cfg=dict(checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth'),
    ),
    neck=dict(_delete_=True, type='msda_plugin.PVTNeck', in_channels=[128, 320, 512], out_channels=256, num_outs=4),
)

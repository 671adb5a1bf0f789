# MMDetection's two-stage Deformable DETR with ResNet-18, without msda_plugin. The two-stage form needs 256 channels;
# two encoder and two decoder layers keep it fast on a CPU.
_base_ = './deformable-detr-two-stage_shunted-nano.py'

model = dict(
    type='DeformableDETR',
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
    ),
    neck=dict(in_channels=[128, 256, 512], out_channels=256),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=dict(embed_dims=256), ffn_cfg=dict(embed_dims=256, feedforward_channels=1024)),
    ),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256),
            cross_attn_cfg=dict(embed_dims=256),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=1024),
        ),
    ),
    positional_encoding=dict(num_feats=128),
    bbox_head=dict(type='DeformableDETRHead', embed_dims=256),
)

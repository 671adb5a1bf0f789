# For comparison: MMDetection's own two-stage Deformable DETR with ResNet-18, with nothing of msda_plugin in the model,
# on the same data. Its two-stage form needs 256 channels; two encoder and two decoder layers keep it quick on a CPU.
_base_ = './deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'

model = dict(
    type='DeformableDETR',
    num_queries=60,
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch'),
    neck=dict(in_channels=[128, 256, 512], out_channels=256),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256), ffn_cfg=dict(embed_dims=256, feedforward_channels=1024))),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256),
            cross_attn_cfg=dict(embed_dims=256),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=1024))),
    positional_encoding=dict(num_feats=128),
    bbox_head=dict(type='DeformableDETRHead', embed_dims=256))

max_epochs = 4  # as many minutes as the main job takes
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, T_max=max_epochs, eta_min_ratio=0.02,
         convert_to_iter_based=True),
]

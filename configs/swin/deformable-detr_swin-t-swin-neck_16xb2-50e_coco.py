# Deformable DETR on Swin-T, with a pyramid fused by shifted-window attention.
_base_ = '../deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        convert_weights=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/'
            'swin_tiny_patch4_window7_224.pth',
        ),
    ),
    neck=dict(_delete_=True, type='msda_plugin.SwinNeck', in_channels=[192, 384, 768], out_channels=256, num_outs=4),
)

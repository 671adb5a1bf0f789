# DINO on Shunted Transformer, with the authors' ImageNet weights.
_base_ = './dino-4scale_r50_8xb2-12e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='msda_plugin.ShuntedTransformer',
        arch='small',
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/ckpt_S.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)

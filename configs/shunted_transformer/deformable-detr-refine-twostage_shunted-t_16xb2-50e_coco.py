# Two-stage Deformable DETR with box refinement on Shunted Transformer, with the authors' ImageNet weights.
_base_ = '../deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='msda_plugin.ShuntedTransformer',
        arch='tiny',
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/ckpt_T.pth'),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)

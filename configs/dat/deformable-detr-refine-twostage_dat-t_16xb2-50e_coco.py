# Two-stage Deformable DETR with box refinement on DAT, with the authors' ImageNet weights.
_base_ = '../deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='msda_plugin.DAT',
        arch='tiny',
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/dat_tiny_in1k_224.pth'),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

# The same on the Base size.
_base_ = './deformable-detr-refine-twostage_dat-t_16xb2-50e_coco.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5, init_cfg=dict(checkpoint='checkpoints/dat_base_in1k_224.pth')),
    neck=dict(in_channels=[256, 512, 1024]),
)

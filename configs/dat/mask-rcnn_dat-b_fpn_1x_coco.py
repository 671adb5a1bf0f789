# The same on the Base size.
_base_ = './mask-rcnn_dat-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5, init_cfg=dict(checkpoint='checkpoints/dat_base_in1k_224.pth')),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

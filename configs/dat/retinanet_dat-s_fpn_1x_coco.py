# The same on the Small size.
_base_ = './retinanet_dat-t_fpn_1x_coco.py'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.3, init_cfg=dict(checkpoint='checkpoints/dat_small_in1k_224.pth'))
)

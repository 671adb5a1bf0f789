# The same on the Small size.
_base_ = './deformable-detr-refine-twostage_dat-t_16xb2-50e_coco.py'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.3, init_cfg=dict(checkpoint='checkpoints/dat_small_in1k_224.pth'))
)

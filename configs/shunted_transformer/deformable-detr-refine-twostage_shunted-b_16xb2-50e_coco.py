# The same on the Base size.
_base_ = './deformable-detr-refine-twostage_shunted-t_16xb2-50e_coco.py'
model = dict(backbone=dict(arch='base', init_cfg=dict(checkpoint='checkpoints/ckpt_B.pth')))

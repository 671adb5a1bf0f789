# The same on the Small size.
_base_ = './deformable-detr-refine-twostage_shunted-t_16xb2-50e_coco.py'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/ckpt_S.pth')))

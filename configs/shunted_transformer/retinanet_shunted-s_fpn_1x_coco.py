# The same on the Small size.
_base_ = './retinanet_shunted-t_fpn_1x_coco.py'
model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='checkpoints/ckpt_S.pth')))

# The same on the Base size.
_base_ = './mask-rcnn_shunted-t_fpn_1x_coco.py'
model = dict(backbone=dict(arch='base', init_cfg=dict(checkpoint='checkpoints/ckpt_B.pth')))

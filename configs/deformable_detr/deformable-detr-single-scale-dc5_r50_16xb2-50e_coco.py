# One map with stride 16: the last backbone stage is dilated instead of strided.
_base_ = './deformable-detr-single-scale_r50_16xb2-50e_coco.py'
model = dict(backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))

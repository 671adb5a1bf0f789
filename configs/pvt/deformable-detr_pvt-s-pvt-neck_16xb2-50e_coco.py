# The same on PVT-Small (v1). The neck normalizes the maps, since this backbone does not.
_base_ = './deformable-detr_pvtv2-b2-pvt-neck_16xb2-50e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='PyramidVisionTransformer',
        num_layers=[3, 4, 6, 3],
        out_indices=(1, 2, 3),
        init_cfg=dict(checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'),
    ),
    neck=dict(input_norm=True),
)

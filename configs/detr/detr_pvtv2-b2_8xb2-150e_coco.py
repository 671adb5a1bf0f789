# DETR on the last stage of PVTv2-B2, as in the PVT paper.
_base_ = './detr_r50_8xb2-150e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='PyramidVisionTransformerV2',
        embed_dims=64,
        num_layers=[3, 4, 6, 3],
        out_indices=(3,),
        init_cfg=dict(checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2.pth'),
    ),
    neck=dict(in_channels=[512]),
)

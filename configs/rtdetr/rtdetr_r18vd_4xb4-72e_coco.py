# ResNet-18-vd with trained norms, a narrower neck, and three decoder layers.
_base_ = './rtdetr_r50vd_4xb4-72e_coco.py'
model = dict(
    backbone=dict(
        depth=18,
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        init_cfg=dict(
            checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
            'ResNet18_vd_pretrained_from_paddle.pth'
        ),
    ),
    neck=dict(in_channels=[128, 256, 512], expansion=0.5),
    decoder=dict(num_layers=3),
)

# `backbone` sets a rate, and a longer key wins: these are the norms of the backbone.
backbone_norms = [f'backbone.stem.{i}' for i in (1, 4, 7)] + [
    f'backbone.layer{stage}.{block}.{norm}'
    for stage in range(1, 5)
    for block in range(6)
    for norm in ('bn1', 'bn2', 'downsample.2')
]
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={name: dict(lr_mult=0.1, decay_mult=0.0) for name in backbone_norms})
)

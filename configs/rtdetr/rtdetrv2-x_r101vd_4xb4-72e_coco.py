# RT-DETRv2-X: a wider encoder on ResNet-101-vd, whose learning rate is 1e-6.
_base_ = './rtdetrv2-l_r50vd_4xb4-72e_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(
            checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
            'ResNet101_vd_ssld_pretrained_from_paddle.pth'
        ),
    ),
    neck=dict(out_channels=384, feedforward_channels=2048),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.01))))

# DEIM-D-FINE-S.
_base_ = './deim-dfine_hgnetv2-m_8xb4-102e_coco.py'

model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(_base_.model.data_preprocessor.batch_augments[0], stop_epoch=64),
            dict(
                _base_.model.data_preprocessor.batch_augments[1],
                sizes=[*range(480, 640, 32), *[640] * 20, *range(672, 801, 32)],
                stop_epoch=120,
            ),
        ]
    ),
    backbone=dict(
        arch='B0',
        init_cfg=dict(
            checkpoint='https://github.com/Peterande/storage/releases/download/dfinev1.0/PPHGNetV2_B0_stage1.pth'
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024], num_blocks=1, expansion=0.5),
    decoder=dict(num_layers=3),
)
max_epochs = 132
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.5))))
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], begin=64, end=120, T_max=56)]
custom_hooks = [
    *_base_.custom_hooks[:2],
    dict(_base_.custom_hooks[2], switch_epoch=64),
    dict(_base_.custom_hooks[3], switch_epoch=120),
]

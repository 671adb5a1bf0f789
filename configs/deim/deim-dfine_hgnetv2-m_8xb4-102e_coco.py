# DEIM-D-FINE-M.
_base_ = './deim-dfine_hgnetv2-l_8xb4-58e_coco.py'

model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(_base_.model.data_preprocessor.batch_augments[0], stop_epoch=49),
            dict(
                _base_.model.data_preprocessor.batch_augments[1],
                sizes=[*range(480, 640, 32), *[640] * 6, *range(672, 801, 32)],
                stop_epoch=90,
            ),
        ]
    ),
    backbone=dict(
        arch='B2',
        use_lab=True,
        init_cfg=dict(
            checkpoint='https://github.com/Peterande/storage/releases/download/dfinev1.0/PPHGNetV2_B2_stage1.pth'
        ),
    ),
    neck=dict(in_channels=[384, 768, 1536], num_blocks=2),
    decoder=dict(num_layers=4),
)
max_epochs = 102
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=0.0004, weight_decay=0.0001),
    paramwise_cfg=dict(
        _delete_=True,
        # Norms of the backbone learn at the full rate, without weight decay.
        custom_keys={
            'backbone': dict(lr_mult=0.1),
            '.bn.weight': dict(decay_mult=0.0),
            '.bn.bias': dict(decay_mult=0.0),
        },
        norm_decay_mult=0.0,
    ),
)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], begin=49, end=90, T_max=41)]
custom_hooks = [
    *_base_.custom_hooks[:2],
    dict(_base_.custom_hooks[2], switch_epoch=49),
    dict(_base_.custom_hooks[3], switch_epoch=90),
]

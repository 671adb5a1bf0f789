# D-FINE-S.
_base_ = './dfine_hgnetv2-l_8xb4-80e_coco.py'
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[*range(480, 640, 32), *[640] * 20, *range(672, 801, 32)],
                stop_epoch=120,
            )
        ]
    ),
    backbone=dict(
        arch='B0',
        use_lab=True,
        frozen_stages=-1,
        frozen_norms=False,
        init_cfg=dict(
            checkpoint='https://github.com/Peterande/storage/releases/download/dfinev1.0/PPHGNetV2_B0_stage1.pth'
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024], num_blocks=1, expansion=0.5),
    decoder=dict(num_layers=3),
)
max_epochs = 132
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=0.0002, weight_decay=0.0001),
    paramwise_cfg=dict(
        # As published, the norms and biases of the backbone do have weight decay.
        custom_keys={'backbone': dict(lr_mult=0.5), 'in_proj_bias': dict(decay_mult=0.0)},
        bias_decay_mult=0.0,
    ),
)
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=1000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=120, switch_pipeline=_base_.plain_pipeline),
]

# RT-DETRv2-L: mixed precision, warmup, and no augmentation in the last epoch.
_base_ = './rtdetr_r50vd_4xb4-72e_coco.py'

strong_epochs = 71  # with augmentation and several sizes
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800],
                stop_epoch=strong_epochs,
            )
        ]
    )
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.1))),
)
param_scheduler = [dict(type='LinearLR', start_factor=0.0005, by_epoch=False, begin=0, end=2000)]
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='PipelineSwitchHook', switch_epoch=strong_epochs, switch_pipeline=_base_.plain_pipeline),
]

# DEIM-D-FINE-L: D-FINE-L with more objects per image (mosaic, mixup), DEIM's loss of the classes, and its schedule.
_base_ = '../dfine/dfine_hgnetv2-l_8xb4-80e_coco.py'
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type='msda_plugin.BatchMixUp', prob=0.5, start_epoch=4, stop_epoch=29),
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[*range(480, 640, 32), *[640] * 4, *range(672, 801, 32)],
                stop_epoch=50,
            ),
        ]
    ),
    backbone=dict(frozen_stages=-1, frozen_norms=False),
    decoder=dict(act='SiLU'),
    bbox_head=dict(act='SiLU', loss_cls=dict(type='msda_plugin.MatchabilityAwareLoss', gamma=1.5, loss_weight=1.0)),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.plain_pipeline))

max_epochs = 58
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=0.0005))
param_scheduler = [
    dict(type='QuadraticWarmupLR', by_epoch=False, begin=0, end=2000),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=29,
        end=50,
        T_max=21,
        eta_min_ratio=0.5,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=1000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.mosaic_pipeline),
    dict(type='PipelineSwitchHook', switch_epoch=29, switch_pipeline=_base_.train_pipeline),
    dict(type='PipelineSwitchHook', switch_epoch=50, switch_pipeline=_base_.plain_pipeline),
]

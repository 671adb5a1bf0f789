# DEIM-D-FINE-M.
_base_ = '../dfine/dfine_hgnetv2-m_8xb4-132e_coco.py'
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type='msda_plugin.BatchMixUp', prob=0.5, start_epoch=4, stop_epoch=49),
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[*range(480, 640, 32), *[640] * 6, *range(672, 801, 32)],
                stop_epoch=90,
            ),
        ]
    ),
    decoder=dict(act='SiLU'),
    bbox_head=dict(act='SiLU', loss_cls=dict(type='msda_plugin.MatchabilityAwareLoss', gamma=1.5, loss_weight=1.0)),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.plain_pipeline))

max_epochs = 102
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=0.0004),
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
param_scheduler = [
    dict(type='QuadraticWarmupLR', by_epoch=False, begin=0, end=2000),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=49,
        end=90,
        T_max=41,
        eta_min_ratio=0.5,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=1000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.mosaic_pipeline),
    dict(type='PipelineSwitchHook', switch_epoch=49, switch_pipeline=_base_.train_pipeline),
    dict(type='PipelineSwitchHook', switch_epoch=90, switch_pipeline=_base_.plain_pipeline),
]

# DEIM-D-FINE-N.
_base_ = '../dfine/dfine_hgnetv2-n_8xb16-160e_coco.py'
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type='msda_plugin.BatchMixUp', prob=0.5, start_epoch=4, stop_epoch=78)]
    ),
    decoder=dict(act='SiLU'),
    bbox_head=dict(act='SiLU', loss_cls=dict(type='msda_plugin.MatchabilityAwareLoss', gamma=1.5, loss_weight=1.0)),
)

train_dataloader = dict(dataset=dict(pipeline=_base_.plain_pipeline))

max_epochs = 160
train_cfg = dict(max_epochs=max_epochs)
# Constant after the warmup.
param_scheduler = [dict(type='QuadraticWarmupLR', by_epoch=False, begin=0, end=2000)]
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=1000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=4, switch_pipeline=_base_.mosaic_pipeline),
    dict(type='PipelineSwitchHook', switch_epoch=78, switch_pipeline=_base_.train_pipeline),
    dict(type='PipelineSwitchHook', switch_epoch=148, switch_pipeline=_base_.plain_pipeline),
]

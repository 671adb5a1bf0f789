# RT-DETRv2-S: ResNet-18-vd trained at the full rate, at 640×640 only, for 120 epochs.
_base_ = './rtdetr_r18vd_4xb4-72e_coco.py'

model = dict(data_preprocessor=dict(batch_augments=None))
max_epochs = 120
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    type='AmpOptimWrapper', loss_scale='dynamic', paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0)
)
param_scheduler = [dict(type='LinearLR', start_factor=0.0005, by_epoch=False, begin=0, end=2000)]
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='PipelineSwitchHook', switch_epoch=117, switch_pipeline=_base_.plain_pipeline),
]

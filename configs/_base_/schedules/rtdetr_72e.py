# The schedule of RT-DETR: a constant learning rate for 16 images per step, and averaged weights.
max_epochs = 72
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    # The authors' expressions miss the norms of the input projections and of the query selection.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(backbone=dict(lr_mult=0.1), in_proj_bias=dict(decay_mult=0.0)),
    ),
)
param_scheduler = []
auto_scale_lr = dict(enable=True, base_batch_size=16)
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=2000, update_buffers=True, priority=49)
]
sync_bn = 'torch'  # in distributed training

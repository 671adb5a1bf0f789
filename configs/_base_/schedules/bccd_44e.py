# For BCCD with batch size 1; averaging the weights reduces the noise of the small batch.
max_epochs = 44
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, weight_decay=1e-3, fused=True),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=max_epochs - 20,
        end=max_epochs,
        T_max=20,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=1)
custom_hooks = [
    dict(type='msda_plugin.TrainingReportHook'),
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.001, gamma=1000, update_buffers=True),
]

# For the generated shapes with batch size 4.
max_epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    # A short training learns most at the full rate, so the rate decays only in the last three epochs.
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=max_epochs - 3,
        end=max_epochs,
        T_max=3,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
custom_hooks = [dict(type='msda_plugin.TrainingReportHook')]

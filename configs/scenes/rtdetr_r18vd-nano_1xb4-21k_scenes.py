# Pre-training of the default model of `train --data` on generated scenes. The learning rate is flat, then falls: at
# the flat rate alone, the AP stops rising.
_base_ = [
    '../_base_/models/rtdetr_r18vd-nano.py',
    '../_base_/datasets/scenes_detection.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(bbox_head=dict(num_classes=42))

max_iters, decay_from = 21_000, 12_000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=3000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-3, fused=True),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=decay_from, end=max_iters),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=500))
log_processor = dict(by_epoch=False)
custom_hooks = [
    dict(type='msda_plugin.TrainingReportHook'),
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.001, gamma=1000, update_buffers=True),
]

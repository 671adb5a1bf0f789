# Real photographs on a CPU: the detector of the main job, on blood cells, from scratch, at 320×240.
_base_ = [
    '../_base_/models/deformable-detr-two-stage_shunted-nano.py', '../_base_/datasets/bccd_detection.py',
    '../_base_/default_runtime.py'
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(
    num_queries=100,
    bbox_head=dict(num_classes=3),
    # So early in a DETR's training the decoder still repeats itself: without suppression duplicates cost the most.
    test_cfg=dict(nms=dict(type='nms', iou_threshold=0.7)))

max_epochs = 44
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# With 205 photographs the number of steps is what limits learning: one photograph a step, and the mean of the weights
# over the last steps takes out the noise of that.
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, weight_decay=1e-3, fused=True),
    clip_grad=dict(max_norm=0.1, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=max_epochs - 20, end=max_epochs, T_max=20, eta_min_ratio=0.02,
         convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=1)
custom_hooks = [
    dict(type='msda_plugin.TrainingReportHook'),
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.001, gamma=1000, update_buffers=True),
]

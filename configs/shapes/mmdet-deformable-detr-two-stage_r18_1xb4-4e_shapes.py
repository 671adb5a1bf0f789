# For comparison: MMDetection's two-stage Deformable DETR with ResNet-18 on the same data.
_base_ = [
    '../_base_/models/mmdet-deformable-detr-two-stage_r18.py',
    '../_base_/datasets/shapes_detection.py',
    '../_base_/schedules/shapes_8e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

max_epochs = 4  # about the training time of `make train`
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        T_max=max_epochs,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]

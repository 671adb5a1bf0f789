# For comparison: MMDetection's two-stage Deformable DETR with ResNet-18 on the same images for the same CPU time, which
# is 14 epochs. Batch normalization and MMDetection's learning rate need two images per step.
_base_ = [
    '../_base_/models/mmdet-deformable-detr-two-stage_r18.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_44e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(num_queries=100, bbox_head=dict(num_classes=3))

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=2)

max_epochs = 14
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=max_epochs - 6,
        end=max_epochs,
        T_max=6,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]

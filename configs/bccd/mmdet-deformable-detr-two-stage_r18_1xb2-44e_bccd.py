# For comparison: MMDetection's own two-stage Deformable DETR with ResNet-18 on the same photographs, with
# the same schedule. Batch normalisation and MMDetection's learning rate go with two photographs a step.
_base_ = [
    '../_base_/models/mmdet-deformable-detr-two-stage_r18.py', '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_44e.py', '../_base_/default_runtime.py'
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(num_queries=100, bbox_head=dict(num_classes=3))

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=2)

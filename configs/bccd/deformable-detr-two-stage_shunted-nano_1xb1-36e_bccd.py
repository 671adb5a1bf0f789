# A small two-stage Deformable DETR on blood cells at 384×288, from scratch on a CPU.
_base_ = [
    '../_base_/models/deformable-detr-two-stage_shunted-nano.py',
    '../_base_/datasets/bccd_384x288.py',
    '../_base_/schedules/bccd_44e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(
    num_queries=100,
    bbox_head=dict(num_classes=3),
    # Early in training a DETR still predicts duplicates, which would cost most of the AP.
    test_cfg=dict(nms=dict(type='nms', iou_threshold=0.7)),
)

# With 205 training images, the number of steps limits learning: one image per step.
train_dataloader = dict(batch_size=1)

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs, val_interval=6)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], begin=max_epochs - 18, end=max_epochs, T_max=18),
]

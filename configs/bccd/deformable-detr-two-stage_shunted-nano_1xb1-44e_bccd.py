# Real photographs on a CPU: the detector of the main job, on blood cells, from scratch, at 320×240.
_base_ = [
    '../_base_/models/deformable-detr-two-stage_shunted-nano.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_44e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(
    num_queries=100,
    bbox_head=dict(num_classes=3),
    # So early in a DETR's training the decoder still repeats itself: without suppression duplicates cost the most.
    test_cfg=dict(nms=dict(type='nms', iou_threshold=0.7)),
)

# With 205 photographs the number of steps is what limits learning: one photograph a step.
train_dataloader = dict(batch_size=1)

# From scratch on the generated shapes, in minutes on two CPU cores.
_base_ = [
    '../_base_/models/deformable-detr-two-stage_shunted-nano.py',
    '../_base_/datasets/shapes_detection.py',
    '../_base_/schedules/shapes_8e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(
    num_queries=40,  # at most seven objects per image
    decoder=dict(num_layers=2),
    # After so short a training a DETR still predicts duplicates.
    test_cfg=dict(nms=dict(type='nms', iou_threshold=0.7)),
)

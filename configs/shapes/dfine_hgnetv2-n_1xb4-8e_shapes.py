# D-FINE, without non-maximum suppression, in twice the time of `make train`.
_base_ = [
    '../_base_/models/dfine_hgnetv2-n.py',
    '../_base_/datasets/shapes_detection.py',
    '../_base_/schedules/shapes_8e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(num_queries=40)  # at most seven objects per image

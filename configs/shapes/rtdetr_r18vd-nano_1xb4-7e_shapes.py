# `make train`: RT-DETR from scratch on the generated shapes, in minutes on two CPU cores.
_base_ = [
    '../_base_/models/rtdetr_r18vd-nano.py',
    '../_base_/datasets/shapes_detection.py',
    '../_base_/schedules/shapes_8e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(num_queries=40, dn_cfg=dict(num_denoising=14))  # at most seven objects per image

max_epochs = 7
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], begin=max_epochs - 4, end=max_epochs, T_max=4),
]

# The `make train` detector on blood cells at 384×288, from scratch on a CPU.
_base_ = [
    '../_base_/models/rtdetr_r18vd-nano.py',
    '../_base_/datasets/bccd_384x288.py',
    '../_base_/schedules/bccd_72e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(bbox_head=dict(num_classes=3), dn_cfg=dict(num_denoising=60))

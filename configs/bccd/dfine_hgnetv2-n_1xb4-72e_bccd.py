# D-FINE on blood cells at 384×288, from scratch on a CPU.
_base_ = [
    '../_base_/models/dfine_hgnetv2-n.py',
    '../_base_/datasets/bccd_384x288.py',
    '../_base_/schedules/bccd_72e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

model = dict(num_queries=300, bbox_head=dict(num_classes=3), dn_cfg=dict(num_denoising=60))

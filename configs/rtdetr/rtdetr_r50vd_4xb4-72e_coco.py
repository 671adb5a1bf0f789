_base_ = [
    '../_base_/models/rtdetr_r50vd.py',
    '../_base_/datasets/coco_rtdetr.py',
    '../_base_/schedules/rtdetr_72e.py',
    '../_base_/default_runtime.py',
]
runner_type = 'msda_plugin.DetectionRunner'

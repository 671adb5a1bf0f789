# MMDetection's DETR config and schedule with msda_plugin's detector and head.
_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
model = dict(type='msda_plugin.DETR', bbox_head=dict(type='msda_plugin.DETRHead'))

runner_type = 'msda_plugin.DetectionRunner'
auto_scale_lr = dict(enable=True)

# MMDetection's Deformable DETR config and schedule with msda_plugin's layers, head, and operator.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
model = dict(type='msda_plugin.DeformableDETR', bbox_head=dict(type='msda_plugin.DeformableDETRHead'))

runner_type = 'msda_plugin.DetectionRunner'
auto_scale_lr = dict(enable=True)

# MMDetection's DINO, accelerated by one hook; it loads the same checkpoints.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_hooks = [dict(type='msda_plugin.AccelerateHook')]

runner_type = 'msda_plugin.DetectionRunner'
auto_scale_lr = dict(enable=True)

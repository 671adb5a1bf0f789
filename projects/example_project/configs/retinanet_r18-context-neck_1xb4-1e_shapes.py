# MMDetection's RetinaNet on the generated shapes, with this package's neck and an attention layer of msda_plugin.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../../../configs/_base_/datasets/shapes_detection.py',
    '../../../configs/_base_/default_runtime.py',
]

runner_type = 'msda_plugin.DetectionRunner'  # supports several processes without a GPU

model = dict(
    backbone=dict(depth=18, init_cfg=None, frozen_stages=-1, norm_eval=False),
    neck=dict(
        _delete_=True,
        type='example_project.ContextNeck',
        attention=dict(type='msda_plugin.DeformableAttention', embed_dims=512, num_heads=8),
        neck=dict(
            type='mmdet.FPN',
            in_channels=[64, 128, 256, 512],
            out_channels=256,
            start_level=1,
            add_extra_convs='on_input',
            num_outs=5,
        ),
    ),
    bbox_head=dict(num_classes=6),
)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100)]

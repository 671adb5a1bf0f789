# D-FINE-X.
_base_ = './dfine_hgnetv2-l_8xb4-80e_coco.py'
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[*range(480, 640, 32), *[640] * 3, *range(672, 801, 32)],
                stop_epoch=72,
            )
        ]
    ),
    backbone=dict(
        arch='B5',
        init_cfg=dict(
            checkpoint='https://github.com/Peterande/storage/releases/download/dfinev1.0/PPHGNetV2_B5_stage1.pth'
        ),
    ),
    neck=dict(out_channels=384, feedforward_channels=2048),
    bbox_head=dict(reg_scale=8.0),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.01)}))

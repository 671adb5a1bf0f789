# D-FINE-L, with the authors' schedule and weights of the backbone.
_base_ = ['../_base_/datasets/coco_detection.py', '../_base_/default_runtime.py']
runner_type = 'msda_plugin.DetectionRunner'

model = dict(
    type='msda_plugin.DFINE',
    num_queries=300,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        # Sides of 480 to 800 pixels, with the authors' frequency of 640.
        batch_augments=[
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[*range(480, 640, 32), *[640] * 4, *range(672, 801, 32)],
                stop_epoch=72,
            )
        ],
    ),
    backbone=dict(
        type='msda_plugin.HGNetV2',
        arch='B4',
        frozen_stages=0,
        frozen_norms=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/Peterande/storage/releases/download/dfinev1.0/PPHGNetV2_B4_stage1.pth',
        ),
    ),
    neck=dict(type='msda_plugin.HybridEncoder', variant='dfine', in_channels=[512, 1024, 2048], out_channels=256),
    decoder=dict(num_layers=6, embed_dims=256, num_heads=8, feedforward_channels=1024, num_points=[3, 6, 3]),
    bbox_head=dict(type='msda_plugin.DFINEHead', num_classes=80, embed_dims=256, reg_max=32, reg_scale=4.0),
    dn_cfg=dict(num_denoising=100, label_noise_ratio=0.5, box_noise_scale=1.0),
    test_cfg=dict(max_per_img=300),
)

max_epochs = 80
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=0.00025, weight_decay=0.000125),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.05)}, norm_decay_mult=0.0),
)
# Constant after the warmup.
param_scheduler = [dict(type='LinearLR', start_factor=0.002, by_epoch=False, begin=0, end=500)]
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=1000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=72, switch_pipeline=_base_.plain_pipeline),
]
auto_scale_lr = dict(enable=True, base_batch_size=32)
sync_bn = 'torch'  # in distributed training

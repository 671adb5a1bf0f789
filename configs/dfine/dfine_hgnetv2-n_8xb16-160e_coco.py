# D-FINE-N: strides 16 and 32 only, one size of images.
_base_ = './dfine_hgnetv2-l_8xb4-80e_coco.py'
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(
        arch='B0',
        use_lab=True,
        out_indices=(2, 3),
        frozen_stages=-1,
        frozen_norms=False,
        init_cfg=dict(
            checkpoint='https://github.com/Peterande/storage/releases/download/dfinev1.0/PPHGNetV2_B0_stage1.pth'
        ),
    ),
    neck=dict(in_channels=[512, 1024], out_channels=128, feedforward_channels=512, num_blocks=2, expansion=0.34),
    decoder=dict(num_layers=3, embed_dims=128, feedforward_channels=512, num_points=[6, 6]),
    bbox_head=dict(embed_dims=128),
)
train_dataloader = dict(batch_size=16)
max_epochs = 160
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=0.0008, weight_decay=0.0001),
    paramwise_cfg=dict(
        # As published, the norms and biases of the backbone do have weight decay.
        custom_keys={'backbone': dict(lr_mult=0.5), 'in_proj_bias': dict(decay_mult=0.0)},
        bias_decay_mult=0.0,
    ),
)
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=1000, update_buffers=True, priority=49),
    dict(type='PipelineSwitchHook', switch_epoch=148, switch_pipeline=_base_.plain_pipeline),
]
auto_scale_lr = dict(base_batch_size=128)

# ViTDet: Mask R-CNN on a plain ViT-B with windows and the simple feature pyramid, with MAE's published weights.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::common/lsj-100e_coco-instance.py']
image_size = (1024, 1024)

model = dict(
    data_preprocessor=dict(
        pad_size_divisor=32, batch_augments=[dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]
    ),
    backbone=dict(
        _delete_=True,
        type='msda_plugin.VisionTransformer',
        arch='base',
        img_size=1024,
        with_cls_token=False,
        final_norm=False,
        window_size=14,
        use_rel_pos=True,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/mae_pretrain_vit_base.pth'),
    ),
    neck=dict(_delete_=True, type='msda_plugin.SimpleFeaturePyramid', in_channels=768, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
)

train_dataloader = dict(batch_size=8)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0))),
)
runner_type = 'msda_plugin.DetectionRunner'
auto_scale_lr = dict(enable=True, base_batch_size=64)

# RT-DETR on ResNet-50-vd.
_base_ = ['../_base_/datasets/coco_detection.py', '../_base_/schedules/rtdetr_72e.py', '../_base_/default_runtime.py']
runner_type = 'msda_plugin.DetectionRunner'

model = dict(
    type='msda_plugin.RTDETR',
    num_queries=300,
    num_feature_levels=3,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        batch_augments=[
            dict(
                type='msda_plugin.BatchRandomResize',
                sizes=[480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800],
            )
        ],
    ),
    backbone=dict(
        type='msda_plugin.ResNetVD',
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=0,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
            'ResNet50_vd_ssld_v2_pretrained_from_paddle.pth',
        ),
    ),
    neck=dict(
        type='msda_plugin.HybridEncoder',
        in_channels=[512, 1024, 2048],
        out_channels=256,
        num_heads=8,
        feedforward_channels=1024,
        expansion=1.0,
    ),
    decoder=dict(
        num_layers=6,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0, batch_first=True),
            cross_attn_cfg=dict(embed_dims=256, num_heads=8, num_points=4, dropout=0.0, batch_first=True),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=1024, ffn_drop=0.0),
        ),
    ),
    bbox_head=dict(
        type='msda_plugin.RTDETRHead',
        num_classes=80,
        embed_dims=256,
        loss_cls=dict(type='msda_plugin.VarifocalLoss', alpha=0.75, gamma=2.0, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    dn_cfg=dict(num_denoising=100, label_noise_ratio=0.5, box_noise_scale=1.0),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0, alpha=0.25, gamma=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=300),
)

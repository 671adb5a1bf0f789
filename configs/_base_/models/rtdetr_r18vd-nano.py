# A small RT-DETR that trains from scratch on a CPU.
model = dict(
    type='msda_plugin.RTDETR',
    num_queries=300,
    num_feature_levels=3,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(type='msda_plugin.ResNetVD', depth=18, base_channels=32, out_indices=(1, 2, 3), norm_eval=False),
    neck=dict(
        type='msda_plugin.HybridEncoder',
        in_channels=[64, 128, 256],
        out_channels=128,
        num_heads=8,
        feedforward_channels=256,
        num_blocks=1,
        expansion=0.5,
    ),
    decoder=dict(
        num_layers=3,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=128, num_heads=8, dropout=0.0, batch_first=True),
            cross_attn_cfg=dict(embed_dims=128, num_heads=8, num_points=4, dropout=0.0, batch_first=True),
            ffn_cfg=dict(embed_dims=128, feedforward_channels=256, ffn_drop=0.0),
        ),
    ),
    bbox_head=dict(
        type='msda_plugin.RTDETRHead',
        num_classes=6,
        embed_dims=128,
        # Learns faster than RT-DETR's varifocal loss, under which poor boxes hardly count.
        loss_cls=dict(type='msda_plugin.MatchabilityAwareLoss', gamma=1.5),
    ),
    dn_cfg=dict(num_denoising=30, label_noise_ratio=0.5, box_noise_scale=1.0),
    test_cfg=dict(max_per_img=100),
)

# Two-stage Deformable DETR with box refinement on a Shunted Transformer that trains from scratch on a CPU.
model = dict(
    type='msda_plugin.DeformableDETR',
    num_queries=60,
    num_feature_levels=4,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='msda_plugin.ShuntedTransformer',
        arch=dict(
            embed_dims=(32, 64, 128, 256),
            depths=(2, 2, 2, 1),
            num_heads=(2, 2, 4, 8),
            mlp_ratios=(4, 4, 4, 4),
            sr_ratios=(8, 4, 2, 1),
            stem_convs=1,
        ),
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
    ),
    neck=dict(
        type='ChannelMapper',
        in_channels=[64, 128, 256],
        kernel_size=1,
        out_channels=128,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
        num_outs=4,
    ),
    encoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=128, num_heads=8, num_levels=4, dropout=0.0, batch_first=True),
            ffn_cfg=dict(embed_dims=128, feedforward_channels=256, ffn_drop=0.0),
        ),
    ),
    decoder=dict(
        num_layers=3,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=128, num_heads=8, dropout=0.0, batch_first=True),
            cross_attn_cfg=dict(embed_dims=128, num_heads=8, num_levels=4, dropout=0.0, batch_first=True),
            ffn_cfg=dict(embed_dims=128, feedforward_channels=256, ffn_drop=0.0),
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=64, normalize=True, offset=-0.5),
    bbox_head=dict(
        type='msda_plugin.DeformableDETRHead',
        num_classes=6,
        embed_dims=128,
        sync_cls_avg_factor=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=100),
)

# A D-FINE of the size of D-FINE-N, with maps of strides 8, 16 and 32, that trains from scratch on a CPU.
model = dict(
    type='msda_plugin.DFINE',
    num_queries=60,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(type='msda_plugin.HGNetV2', arch='B0', use_lab=True),
    neck=dict(
        type='msda_plugin.HybridEncoder',
        variant='dfine',
        in_channels=[256, 512, 1024],
        out_channels=128,
        feedforward_channels=256,
        num_blocks=1,
        expansion=0.34,
    ),
    decoder=dict(num_layers=3, embed_dims=128, num_heads=8, feedforward_channels=256, num_points=[3, 6, 3]),
    bbox_head=dict(type='msda_plugin.DFINEHead', num_classes=6, embed_dims=128),
    dn_cfg=dict(num_denoising=30, label_noise_ratio=0.5, box_noise_scale=1.0),
    test_cfg=dict(max_per_img=100),
)

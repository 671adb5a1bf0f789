# ResNet-34-vd and four decoder layers.
_base_ = './rtdetr_r18vd_4xb4-72e_coco.py'
model = dict(
    backbone=dict(
        depth=34,
        init_cfg=dict(
            checkpoint='https://github.com/lyuwenyu/storage/releases/download/v0.1/'
            'ResNet34_vd_pretrained_from_paddle.pth'
        ),
    ),
    decoder=dict(num_layers=4),
)

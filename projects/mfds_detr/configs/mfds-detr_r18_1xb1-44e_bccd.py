# A small MFDS-DETR that trains from scratch on a CPU: ResNet-18, 128 channels, images of 320x240.
_base_ = '../../../configs/bccd/deformable-detr-two-stage_shunted-nano_1xb1-44e_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        num_stages=4,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN'),
        style='pytorch',
    ),
    neck=dict(_delete_=True, type='msda_plugin.MFDSHSFPN', in_channels=[128, 256, 512], out_channels=128),
)

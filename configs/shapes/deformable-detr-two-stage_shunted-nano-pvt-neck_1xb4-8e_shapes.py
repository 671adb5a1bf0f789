# The `make train` detector with a pyramid fused by spatial-reduction attention.
_base_ = './deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
model = dict(
    neck=dict(_delete_=True, type='msda_plugin.PVTNeck', in_channels=[64, 128, 256], out_channels=128, num_outs=4)
)

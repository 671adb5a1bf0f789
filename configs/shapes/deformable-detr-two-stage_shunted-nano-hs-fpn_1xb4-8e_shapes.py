# The `make train` detector with the high-level screening pyramid of MFDS-DETR.
_base_ = './deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
model = dict(neck=dict(_delete_=True, type='msda_plugin.MFDSHSFPN', in_channels=[64, 128, 256], out_channels=128))

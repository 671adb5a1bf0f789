# For BCCD with batch size 4.
_base_ = './bccd_44e.py'

max_epochs = 72
train_cfg = dict(max_epochs=max_epochs, val_interval=12)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], begin=max_epochs - 30, end=max_epochs, T_max=30),
]
auto_scale_lr = dict(base_batch_size=4)

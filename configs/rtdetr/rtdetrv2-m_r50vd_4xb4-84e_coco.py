# RT-DETRv2-M: a narrower neck; trained with six decoder layers, evaluated with three.
_base_ = './rtdetrv2-l_r50vd_4xb4-72e_coco.py'

strong_epochs = 81
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(_base_.model.data_preprocessor.batch_augments[0], stop_epoch=strong_epochs)]
    ),
    neck=dict(expansion=0.5),
    decoder=dict(num_eval_layers=3),
)
train_cfg = dict(max_epochs=84)
custom_hooks = [
    _base_.custom_hooks[0],
    dict(type='PipelineSwitchHook', switch_epoch=strong_epochs, switch_pipeline=_base_.plain_pipeline),
]

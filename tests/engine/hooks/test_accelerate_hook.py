"""AccelerateHook in a stock config, run by MMEngine's runner."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention as StockAttention
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

import msda_plugin
from msda_plugin.engine.hooks import AccelerateHook, accelerate_hook
from msda_plugin.layers import MultiScaleDeformableAttention
from msda_plugin.registry import HOOKS
from msda_plugin.tools.shapes import CLASSES, generate


@pytest.fixture
def cfg(tmp_path, tiny_stock_config):
    """The tiny stock config with two generated training images, one epoch, and a test."""
    data = tmp_path / 'data'
    generate(str(data), train=2, val=1, size=(96, 96), seed=1)

    def loader(split, **pipeline_end):
        return dict(
            batch_size=1,
            num_workers=0,
            persistent_workers=False,
            dataset=dict(
                _delete_=True,
                type='CocoDataset',
                data_root=f'{data}/',
                metainfo=dict(classes=CLASSES),
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img=f'{split}/'),
                test_mode=split == 'val',
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations', with_bbox=True),
                    dict(type='Resize', scale=(96, 96)),
                    dict(type='PackDetInputs', **pipeline_end),
                ],
            ),
        )

    cfg = Config.fromfile(str(tiny_stock_config))
    test = loader('val', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'))
    cfg.merge_from_dict(
        dict(
            train_dataloader=loader('train'),
            val_dataloader=test,
            test_dataloader=test,
            val_evaluator=dict(ann_file=f'{data}/annotations/val.json'),
            test_evaluator=dict(ann_file=f'{data}/annotations/val.json'),
            train_cfg=dict(max_epochs=1),
            default_hooks=dict(checkpoint=dict(by_epoch=True)),
            visualizer=None,
            work_dir=str(tmp_path / 'work'),
            custom_hooks=[dict(type='msda_plugin.AccelerateHook')],
        )
    )
    cfg.experiment_name = tmp_path.name
    return cfg


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: lines.append(record.getMessage()))
    monkeypatch.setattr(logging, 'raiseExceptions', False)
    return lines


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, StockAttention)]


def test_stock_config_runs_accelerated(cfg, log):
    runner = Runner.from_cfg(cfg)
    assert all(type(layer) is StockAttention for layer in attention_layers(runner.model))
    runner.train()
    assert runner.iter == 2
    layers = attention_layers(runner.model)
    assert len(layers) == 4 and all(isinstance(layer, MultiScaleDeformableAttention) for layer in layers)
    said = [line for line in log if line.startswith('accelerate: ')]
    assert len(said) == 1 and '4 MultiScaleDeformableAttention layers of DeformableDETR' in said[0]

    # The checkpoint has the keys of the stock model.
    names = torch.load(f'{cfg.work_dir}/epoch_1.pth', weights_only=False)['state_dict'].keys()
    msda_plugin.restore(runner.model)
    assert names == runner.model.state_dict().keys()


def test_runs_before_a_test(cfg, log):
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert all(isinstance(layer, MultiScaleDeformableAttention) for layer in attention_layers(runner.model))


def test_averaged_model_is_accelerated_too(cfg, log):
    cfg.custom_hooks = [dict(type='EMAHook'), *cfg.custom_hooks]
    runner = Runner.from_cfg(cfg)
    runner.call_hook('before_run')
    [ema] = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    layers = attention_layers(ema.ema_model)
    assert len(layers) == 4 and all(isinstance(layer, MultiScaleDeformableAttention) for layer in layers)


def test_is_registered():
    assert HOOKS.get('msda_plugin.AccelerateHook') is AccelerateHook


def test_switches(monkeypatch):
    taken = {}
    monkeypatch.setattr(accelerate_hook, 'accelerate', lambda model, **switches: taken.update(switches))
    given = dict(inference=True, channels_last=None, fold=None, fast_dropout=True)
    named = dict(dtype='bfloat16', training_dtype='bfloat16')
    hook = HOOKS.build(dict(type='msda_plugin.AccelerateHook', **given, **named))
    hook.before_run(SimpleNamespace(model=None))
    assert taken == dict(given, dtype=torch.bfloat16, training_dtype=torch.bfloat16)
    for argument in named:
        for wrong in ('bf16', 'nn', 16):
            with pytest.raises(ValueError, match=f"{argument} is '{wrong}'; expected the name of a dtype of torch"):
                AccelerateHook(**{argument: wrong})

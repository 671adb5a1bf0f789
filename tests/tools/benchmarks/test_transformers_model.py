"""``benchmark model hf:NAME``: models of transformers, their inputs, and the measurements."""

import argparse
import sys

import pytest
import torch

pytest.importorskip('mmdet')

from msda_plugin.__main__ import main
from msda_plugin.tools.benchmarks import model as benchmark
from msda_plugin.tools.benchmarks import transformers_model


@pytest.fixture
def args():
    parser = argparse.ArgumentParser()
    benchmark.add_parser(parser.add_subparsers())
    return parser.parse_args(
        ['model', 'hf:deformable_detr', *'--height 64 --width 96 --runs 1 --threads 1 --batch 2'.split()]
    )


@pytest.fixture
def tiny(monkeypatch):
    """The default sizes take too long to build."""
    transformers = pytest.importorskip('transformers')

    def build(name):
        config = transformers.DeformableDetrConfig(
            backbone_config=transformers.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 32, 64],
                depths=[1, 1, 1, 1],
                out_features=['stage2', 'stage3', 'stage4'],
            ),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=20,
        )
        return transformers.DeformableDetrForObjectDetection(config)

    monkeypatch.setattr(transformers_model, 'build', build)


@pytest.mark.parametrize('training', [False, True])
def test_measures(args, tiny, training):
    measured = benchmark.measure(args, 'float32', training)
    assert 0 < measured.seconds and measured.peak > 50e6
    assert training == (measured.attention is None)


def test_compares_raw_outputs(args, tiny):
    count, difference, choices, otherwise = benchmark.compare(args)
    assert (count, choices, otherwise) == (4, 0, 0)
    assert 0 < difference < 1e-4


def test_infinite_outputs_are_equal(args, tiny, monkeypatch):
    monkeypatch.setattr(benchmark, 'tensors_in', lambda outputs: [torch.tensor([1.0, -torch.inf])])
    assert benchmark.compare(args)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize('name', transformers_model.NAMES)
def test_training_step_of_each_model(name):
    pytest.importorskip('transformers')
    model = transformers_model.build(name)
    batch = transformers_model.make_batch(name, 256, 320, 1, training=True)  # enough pixels for 900 queries
    benchmark.loss(model, batch).backward()
    layer = benchmark.attention_layers(model)[0]
    assert layer.sampling_offsets.bias.grad.abs().max() > 0


def test_default_width(args):
    args.width = None
    assert benchmark.image_width(args) == 1066
    args.config = 'detector.py'
    assert benchmark.image_width(args) == 1344


def test_inputs():
    inputs = transformers_model.make_batch('grounding_dino', 40, 60, 2, training=True)
    assert inputs['pixel_values'].shape == (2, 3, 40, 60) and inputs['input_ids'].shape[0] == 2
    for labels in inputs['labels']:
        center, size = labels['boxes'].split(2, -1)
        assert labels['boxes'].shape == (10, 4) and (center - size / 2 >= 0).all() and (center + size / 2 <= 1).all()
    masks = transformers_model.make_batch('mask2former', 40, 60, 1, training=True)['mask_labels'][0]
    assert masks.shape == (10, 40, 60)
    for mask in masks.bool():  # a filled rectangle
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None])
    assert masks.sum() > 0
    assert transformers_model.make_batch('deformable_detr', 8, 8, 1, training=False).keys() == {
        'pixel_values',
        'pixel_mask',
    }


def test_errors(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    for name, message in (
        ('vit', 'hf:vit is unknown; choose one of hf:deformable_detr, '),
        ('deformable_detr', 'hf:deformable_detr needs transformers'),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(['benchmark', 'model', f'hf:{name}'])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

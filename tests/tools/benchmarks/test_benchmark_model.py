"""``benchmark model``: measurements, comparison of the outputs, and the table."""

import argparse
import logging
import warnings

import pytest
import torch
from mmengine.logging import MMLogger

from msda_plugin.__main__ import main
from msda_plugin.acceleration import low_precision
from msda_plugin.tools.benchmarks import model as benchmark


@pytest.fixture(autouse=True)
def restore_log_level():
    yield
    MMLogger.get_instance('msda_plugin').setLevel(logging.NOTSET)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    benchmark.add_parser(parser.add_subparsers())
    return parser.parse_args(['model', *map(str, argv)])


@pytest.fixture
def args(tiny_stock_config):
    return arguments(tiny_stock_config, '--height', 64, '--width', 96, '--batch', 2, '--runs', 1, '--threads', 1)


@pytest.mark.parametrize('training', [False, True])
def test_measures(args, training):
    measured = benchmark.measure(args, 'float32', training)
    assert 0 < measured.seconds and measured.peak > 50e6
    if training:
        assert measured.attention is None
    else:
        assert 0 < measured.attention < 10 * measured.seconds


@pytest.mark.parametrize(('variant', 'lowest', 'highest'), [('float32', 0, 1e-4), ('bfloat16', 1e-4, 0.1)])
def test_compares_raw_outputs(args, variant, lowest, highest, monkeypatch):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: True)
    count, difference, choices, otherwise = benchmark.compare(args, variant)
    assert (count, choices, otherwise) == (4, 0, 0)
    assert lowest < difference < highest


def test_variants_are_the_steps(args):
    for variant, channels_last, folded in (('channels_last', True, False), ('fold', False, True)):
        model = benchmark.build(args)
        benchmark.accelerate(model, **benchmark.VARIANTS[variant])
        assert model.backbone.conv1.channels_last == channels_last
        assert (vars(model.backbone.conv1).get('folded_norm') is model.backbone.bn1) == folded


def test_silences_the_warning_of_meshgrid_alone():
    class Warns(torch.nn.Module):
        def forward(self, x):
            warnings.warn('another one', stacklevel=1)
            return torch.meshgrid(x, x)

    torch.set_warn_always(True)
    try:
        with pytest.warns(UserWarning) as caught:
            benchmark.run_model(Warns(), dict(x=torch.arange(2)), 'tensor')
    finally:
        torch.set_warn_always(False)
    assert [str(warning.message) for warning in caught] == ['another one']


def test_difference_of_changed_model(args, monkeypatch):
    def worsen(model, **switches):
        with torch.no_grad():
            model.bbox_head.cls_branches[0].bias += 0.5
        return 0

    monkeypatch.setattr(benchmark, 'accelerate', worsen)
    assert benchmark.compare(args)[1] == pytest.approx(0.5, rel=1e-3)


def test_both_sides_have_same_weights(args):
    models = [benchmark.build(args) for _ in range(2)]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_downloads():
    cfg = dict(
        model=dict(
            pretrained='x',
            init_cfg=dict(type='Pretrained', checkpoint='http://x'),
            neck=[dict(init_cfg=dict(type='Xavier'))],
        ),
        batch_augments=[1],
    )
    assert benchmark.without_downloads(cfg) == dict(
        model=dict(pretrained=None, init_cfg=None, neck=[dict(init_cfg=dict(type='Xavier'))]), batch_augments=None
    )


def test_second_pass_replays_choices():
    choices = benchmark.SameChoices()
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.2, 0.3]])
    with choices:
        first = torch.topk(scores, 2, dim=1)
        choices.replay()
        second = torch.topk(scores.flip(1), 2, dim=1)
    assert first.indices.tolist() == second.indices.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(second.values, torch.tensor([[0.5, 0.1], [0.3, 0.9]]))
    assert (choices.count, choices.otherwise) == (4, 3)


def test_table(args, monkeypatch, capsys):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: False)

    def run_here(function, *given):
        if function is benchmark.compare:
            return 12, 2e-6 if given[1] == 'accelerated' else 3e-6, 900, 2
        _, variant, training = given
        return benchmark.Measurement(
            {None: 3.0, 'accelerated': 1.0, 'float32': 0.5}[variant],
            5e8 if variant else 1e9,
            None if training else 0.25,
        )

    monkeypatch.setattr(benchmark, 'in_a_process', run_here)
    assert benchmark.run(args) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert '2x3x64x96' in lines[1] and 'backend cpu' in lines[1]
    rows = [line.split() for line in lines if line.startswith(('inference', 'training'))]
    assert rows == [
        ['inference', 'stock', '3.000', '1000', '1.00x', '100%', '0.250'],
        ['inference', 'accelerated', '1.000', '500', '3.00x', '50%', '2.0e-06', '0.250'],
        ['training', 'step', 'stock', '3.000', '1000', '1.00x', '100%'],
        ['training', 'step', 'accelerated', '1.000', '500', '3.00x', '50%'],
        ['inference', 'float32', '0.500', '500', '6.00x', '50%', '3.0e-06', '0.250'],
        ['training', 'step', 'float32', '0.500', '500', '6.00x', '50%'],
    ]
    assert 'rank 2 of 900' in out and 'take 0.250 s of the stock inference' in out
    assert 'bfloat16 was not measured: this CPU has no bfloat16 instructions' in out


def test_invalid_config(tmp_path, capsys):
    empty, other = tmp_path / 'empty.py', tmp_path / 'other.py'
    empty.write_text('a = 1')
    other.write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'")
    for path, message in (
        (tmp_path / 'none.py', 'does not exist'),
        (empty, 'has no model'),
        (other, 'RetinaNet, has no MultiScaleDeformableAttention'),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(['benchmark', 'model', str(path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

"""``benchmark backbone``: both implementations compute the same; the table."""

import argparse

import pytest
import torch

from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.tools.benchmarks import backbone
from msda_plugin.tools.benchmarks.comparison import Measurement

ARCH = dict(embed_dims=(16, 32), depths=(1, 2), num_heads=(2, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1), stem_convs=1)


@pytest.mark.parametrize('training', [False, True])
def test_plain_forward_computes_same_result(training):
    torch.manual_seed(0)
    model = ShuntedTransformer(ARCH, drop_path_rate=0.0).double().train(training)
    image = torch.rand(2, 3, 37, 50, dtype=torch.float64)
    for out, expected in zip(model(image), backbone.plain_forward(model, image), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_measures_in_fresh_process():
    measured = backbone.measure('msda_plugin', ARCH, (1, 3, 32, 32), backward=True, threads=1, repeats=1)
    assert measured.seconds > 0
    assert measured.peak > 50e6


def test_prints_both_implementations(monkeypatch, capsys):
    measured = {'plain': Measurement(2.0, 10**9), 'msda_plugin': Measurement(0.5, 25 * 10**7)}
    monkeypatch.setattr(backbone, 'measure', lambda implementation, *_: measured[implementation])
    parser = argparse.ArgumentParser()
    backbone.add_parser(parser.add_subparsers())
    assert backbone.run(parser.parse_args(['backbone', '--size', '64', '96'])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines[2:]] == [['1.00x', '100%'], ['4.00x', '25%']] * 2
    assert '1x3x64x96' in lines[2]

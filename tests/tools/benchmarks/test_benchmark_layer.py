"""``benchmark layer``: both implementations compute the same; the table."""

import argparse

import pytest
import torch

from msda_plugin.tools.benchmarks import layer
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement

CPU = torch.device('cpu')


def arguments(*argv):
    parser = argparse.ArgumentParser()
    layer.add_parser(parser.add_subparsers())
    return parser.parse_args(['layer', *argv])


@pytest.mark.parametrize('case', layer.CASES, ids=lambda case: case.name)
def test_both_sides_compute_same_result(case):
    torch.manual_seed(0)
    levels = [(16, 24), (8, 12), (4, 6), (2, 3)][: len(case.strides)]
    modules, *functions = case.build(levels, CPU)
    x = torch.randn(1, case.tokens(levels), case.channels)
    assert layer.largest_difference(*functions, x) < 1e-5
    layer.forward_backward(modules, functions[1], x)
    own = dict(modules[-1].named_parameters())
    assert all(parameter.grad is not None for parameter in own.values())


def test_largest_difference_of_different_results():
    assert layer.largest_difference(lambda x: 2 * x, lambda x: 2.02 * x, torch.ones(3)) == pytest.approx(0.01, 1e-3)


def test_measures_every_layer_forward_and_backward(monkeypatch):
    monkeypatch.setattr(layer, 'CASES', layer.CASES[-1:])
    rows = list(layer.comparisons(arguments('--height', '64', '--width', '96', '--repeats', '1', '--threads', '1')))
    assert [(row.case, row.run) for row in rows] == [
        (layer.CASES[0].name, what) for what in ('forward', 'forward + backward')
    ]
    assert all(row.stock.seconds > 0 and row.ours.seconds > 0 and row.difference < 1e-5 for row in rows)


def test_prints_ratio_and_difference(monkeypatch, capsys):
    row = Comparison('windows', 'forward', ('mmdet', 'ours'), Measurement(0.03), Measurement(0.01), 2e-7)
    monkeypatch.setattr(layer, 'comparisons', lambda args: [row])
    assert layer.run(arguments('--threads', '1')) == 0
    conditions, _, line = capsys.readouterr().out.splitlines()
    assert 'an image of 800x1066' in conditions and '1 threads' in conditions
    assert line.split() == ['windows', 'forward', 'mmdet', '30.00', '10.00', '3.00x', '2.0e-07']

"""``benchmark head``: both implementations compute the same losses; the table."""

import argparse

import pytest
import torch

from msda_plugin.tools.benchmarks import head


def parse(*argv):
    parser = argparse.ArgumentParser()
    head.add_parser(parser.add_subparsers())
    return parser.parse_args(['head', *argv])


@pytest.mark.parametrize('case', head.CASES, ids=lambda case: case.name)
def test_losses_equal_mmdet(case):
    inputs = head.make_inputs(case, batch=2, queries=20, objects=4, device=torch.device('cpu'))
    stock, ours = case.build('mmdet'), case.build('msda_plugin')
    assert ours.matcher is not None
    assert head.largest_difference(stock, ours, inputs) < 1e-5
    losses = head.step(ours, inputs)
    assert len(losses) == 3 * (head.LAYERS + bool(case.keys))


def test_largest_difference_of_different_losses():
    case = head.CASES[0]
    inputs = head.make_inputs(case, batch=1, queries=20, objects=4, device=torch.device('cpu'))
    ours = case.build('msda_plugin')
    ours.loss_bbox.loss_weight *= 1.01
    assert head.largest_difference(case.build('mmdet'), ours, inputs) == pytest.approx(0.01, rel=1e-3)


def test_prints_ratio_and_difference(monkeypatch, capsys):
    monkeypatch.setattr(head, 'Timer', lambda *_: lambda stock, ours: [0.030, 0.010])
    monkeypatch.setattr(head, 'largest_difference', lambda *_: 2e-7)
    assert head.run(parse('--queries', '10', '--objects', '3', '--threads', '1')) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert '10 queries, 6 layers, batch 2, 3 objects an image' in title
    assert [row.split()[-4:] for row in rows] == [['30.00', '10.00', '3.0x', '2.0e-07']] * 3

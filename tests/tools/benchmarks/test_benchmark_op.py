"""``benchmark op``: both implementations compute the same; the tables."""

import argparse
import re

import pytest
import torch

from msda_plugin.tools.benchmarks import op

SHAPE = op.Shape('', ((5, 6), (3, 2)), 2, 7, heads=2, head_dim=8)


@pytest.fixture
def inputs():
    return op.make_inputs(SHAPE, torch.device('cpu'))


def test_both_sides_compute_same_result(inputs):
    stock, ours = (op.call(form, SHAPE, inputs, True) for form in (op.mmcv_path(torch.device('cpu')), op.plain))
    assert len(ours) == 4
    for a, b in zip(stock, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_parts_and_fused_form_compute_same_result(inputs):
    levels = torch.tensor(SHAPE.levels)
    tensors = [inputs[name] for name in ('value', 'points', 'offsets', 'logits')]
    torch.testing.assert_close(op.parts(levels, *tensors), op.fused(levels, *tensors))


def test_corner_bytes():
    # 2 images, 7 queries, 2 heads, 2 levels, 4 points, 4 corners, 8 channels of 4 bytes
    assert SHAPE.corner_bytes == 2 * 7 * 2 * 2 * 4 * 4 * 8 * 4


def test_prints_the_tables(monkeypatch, capsys):
    monkeypatch.setattr(op, 'SHAPES', (SHAPE,))
    monkeypatch.setattr(op, 'growth', lambda *_: ['growth'])
    monkeypatch.setattr(op, 'cache_bound', lambda *_: 'bound')
    monkeypatch.setattr(op, 'memory', lambda *_: 'memory')
    parser = argparse.ArgumentParser()
    op.add_parser(parser.add_subparsers())
    assert op.run(parser.parse_args(['op', '--repeats', '1', '--threads', '1'])) == 0
    conditions, *lines = capsys.readouterr().out.splitlines()
    assert 'backend cpu' in conditions and 'median of 1 runs' in conditions
    heads = [line.split() for line in lines if 'ratio' in line]
    assert heads == [
        ['shape', 'mmcv', 'ms', 'ours', 'ms', 'ratio'],
        ['parts', 'ms', 'fused', 'ms', 'ratio'],
        ['float32', 'bfloat16', 'ratio'],
    ]
    rows = [line for line in lines if line.endswith('x')]
    assert len(rows) == 5 and sum('forward + backward' in row for row in rows) == 2
    assert lines[-4] == 'growth' and lines[-2:] == ['bound', 'memory']
    times = r'cost of a call: without gradients \d+\.\d µs, recorded for gradients \d+\.\d µs, with backward \d+\.\d µs'
    assert re.fullmatch(times, lines[-3])


def test_peers(monkeypatch, capsys):
    monkeypatch.setattr(op, 'SHAPES', (SHAPE,))
    parser = argparse.ArgumentParser()
    op.add_parser(parser.add_subparsers())
    command = ['op', '--quick', '--repeats', '1', '--threads', '1']
    peer = 'msda_plugin.ops:ms_deform_attn_reference'
    assert op.run(parser.parse_args([*command, '--peer', peer])) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f'peer: {peer}')
    assert lines[start + 1].split() == ['shape', 'peer', 'ms', 'ours', 'ms', 'ratio']
    assert [line.endswith('x') for line in lines[start + 2 :]] == [True, True]
    for wrong in ('no_such_module:f', 'msda_plugin.ops:no_such_function', 'msda_plugin.ops'):
        with pytest.raises(SystemExit, match='2'):
            op.run(parser.parse_args([*command, '--peer', wrong]))
        assert f'benchmark op: --peer {wrong} cannot be imported: ' in capsys.readouterr().err

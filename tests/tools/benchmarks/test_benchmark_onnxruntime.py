"""``benchmark onnxruntime``: all sides compute the same; the tables."""

import argparse
import sys

import pytest

from msda_plugin.libraries import LIBRARY_DIR
from msda_plugin.tools.benchmarks import onnxruntime as benchmark
from msda_plugin.tools.benchmarks.op import Shape

built = (LIBRARY_DIR / 'libmsda_onnxruntime.so').exists()
needs_library = pytest.mark.skipif(not built, reason='libmsda_onnxruntime.so is not built')
SHAPE = Shape('small', ((5, 6), (3, 2)), 2, 7, heads=2, head_dim=8)


@pytest.fixture
def args():
    parser = argparse.ArgumentParser()
    benchmark.add_parser(parser.add_subparsers())
    return parser.parse_args(['onnxruntime', '--repeats', '1', '--threads', '1'])


@needs_library
def test_all_sides_compute_the_same(args):
    pytest.importorskip('onnxruntime')
    for sides in (('grid_sample', 'custom'), ('torch', 'custom'), ('gather', 'tensorrt')):
        items = list(benchmark.comparisons(args, sides, (SHAPE,)))
        assert [item.run for item in items] == ['plain', 'fused']
        for item in items:
            assert item.sides == sides and item.case == 'small' and min(item.stock.seconds, item.ours.seconds) > 0
            assert item.difference < (1e-5 if sides[0] != 'torch' else 1e-30)


@needs_library
def test_prints_the_tables(args, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')

    def comparisons(args, sides):
        measured = (benchmark.Measurement(seconds) for seconds in (0.3, 0.02))
        yield benchmark.Comparison('encoder', 'plain', sides, *measured, 1e-6)

    monkeypatch.setattr(benchmark, 'comparisons', comparisons)
    assert benchmark.run(args) == 0
    conditions, *lines = capsys.readouterr().out.splitlines()
    assert 'onnxruntime' in conditions and '1 threads' in conditions
    assert [line.split() for line in lines] == [
        ['shape', 'operator', 'grid_sample', 'ms', 'custom', 'ms', 'ratio', 'difference'],
        ['encoder', 'plain', '300.00', '20.00', '15.00x', '1.0e-06'],
        ['shape', 'operator', 'torch', 'ms', 'custom', 'ms', 'ratio', 'difference'],
        ['encoder', 'plain', '300.00', '20.00', '15.00x', '1.0e-06'],
    ]


@needs_library
def test_without_onnxruntime(args, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit) as exit:
        benchmark.run(args)
    assert exit.value.code == 2
    assert 'onnx and onnxruntime are needed' in capsys.readouterr().err

"""``benchmark gpu``: every step as a dry run on the CPU, its inputs, errors and lower bounds."""

import argparse
import enum
import importlib.machinery
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from msda_plugin.tools import benchmark, benchmarks
from msda_plugin.tools.benchmarks import gpu, mmcv_kernels, op
from msda_plugin.tools.benchmarks.timing import EventTimer

CPU = torch.device('cpu')
SMALL = gpu.Case(op.Shape('small', ((6, 9), (3, 4)), 2, 66, heads=4, head_dim=8, points=3), True)
MACHINE = gpu.Machine('CPU', 'cpu', 1e9, 2e9, 1000)


def dry_run(*arguments):
    return benchmark.main(['gpu', '--dry-run', '--cases', 'decoder, 300', *arguments])


def test_dry_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'msda_plugin.tools.benchmarks.model', None)
    monkeypatch.delattr(benchmarks, 'model', raising=False)  # if another test imported it
    assert dry_run('--json', str(tmp_path / 'figures.json'), '--peer', 'no.such:thing') == 0
    printed = capsys.readouterr().out
    assert printed.startswith('DRY RUN') and 'WRONG' not in printed
    assert '--peer no.such:thing: skipped' in printed and 'Models: skipped' in printed
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['dry_run'] and len(figures['operator']) == 2 * len(gpu.DTYPES)
    for row in figures['operator']:
        expected = {*gpu.OWN, 'grid_sample', 'mmcv'}
        expected -= {'mmcv'} if row['dtype'] == 'bfloat16' else set()
        expected -= set() if row['backward'] else {'deterministic'}
        assert set(row['seconds']) == expected and min(row['seconds'].values()) > 0
        assert max(row['errors'][name] for name in gpu.OWN) < 3e-3


@pytest.mark.slow
def test_runs_without_openmmlab():
    """A machine with a GPU may have no OpenMMLab packages."""
    code = (
        'import sys; sys.modules.update(mmengine=None, mmcv=None, mmdet=None); '
        'from msda_plugin.__main__ import main; '
        "sys.exit(main(['benchmark', 'gpu', '--dry-run', '--cases', 'decoder, 300', '--dtypes', 'float32']))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Models: skipped, because' in done.stdout


def test_reports_wrong_result(capsys, monkeypatch):
    plain, fused, *others = gpu.own_forms()
    wrong = fused._replace(call=lambda *arguments: fused.call(*arguments) * 1.01)
    monkeypatch.setattr(gpu, 'own_forms', lambda: [plain, wrong, *others])
    assert dry_run('--dtypes', 'float32', '--skip-models') == 1
    assert 'WRONG' in capsys.readouterr().out


def test_a_failing_part_does_not_end_the_run(capsys, monkeypatch, tmp_path):
    def fails(*arguments):
        assert json.loads(path.read_text())['operator'] if path.exists() else True  # written after each row
        raise RuntimeError('out of memory')

    path = tmp_path / 'figures.json'
    plain, fused, *others = gpu.own_forms()
    monkeypatch.setattr(gpu, 'own_forms', lambda: [plain, fused._replace(call=fails), *others])
    monkeypatch.setattr(gpu, 'model_rows', lambda args: iter([dict(config='x', training=False, failure='y')]))
    assert dry_run('--json', str(path), '--dtypes', 'float32', 'bfloat16') == 1
    printed = capsys.readouterr().out
    assert printed.count('fused: failed for decoder, 300') == 2 and printed.count(' FAILED') == 4
    figures = json.loads(path.read_text())
    assert [row['failures'] for row in figures['operator']] == [{'fused': 'RuntimeError: out of memory'}] * 4
    assert all('plain' in row['seconds'] for row in figures['operator']) and figures['models'][0]['failure'] == 'y'


def test_a_failing_case_is_reported(capsys, monkeypatch):
    def fails(*arguments):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(gpu, 'make_inputs', fails)
    assert dry_run('--dtypes', 'float32', '--skip-models') == 1
    assert 'decoder, 300, float32: failed (out of memory)' in capsys.readouterr().out


def test_deformops_is_a_peer_where_it_is_installed(monkeypatch):
    """Its interface: levels and points in one dimension of the weights, and a backend by name."""
    registry = types.ModuleType('deformops.registry')
    registry.Backend = enum.Enum('Backend', ['TRITON', 'CUDA', 'EAGER'])
    calls = []

    def msda(value, shapes, starts, locations, weights, *, backend):
        calls.append(backend)
        return gpu.ms_deform_attn(value, shapes, starts, locations, weights.unflatten(-1, locations.shape[3:5]))

    registry.msda = msda
    package = types.ModuleType('deformops')
    package.__spec__ = importlib.machinery.ModuleSpec('deformops', None)
    monkeypatch.setitem(sys.modules, 'deformops', package)
    monkeypatch.setitem(sys.modules, 'deformops.registry', registry)
    forms = {form.name: form for form in gpu.peers(benchmark_arguments('--dry-run'))}
    inputs = gpu.make_inputs(SMALL, CPU, torch.float32)
    shapes, starts = torch.tensor(SMALL.shape.levels), torch.tensor([0, 54])
    expected = gpu.ms_deform_attn(inputs['value'], shapes, starts, inputs['locations'], inputs['weights'])
    for name in ('deformops triton', 'deformops cuda'):
        found = forms[name].call(shapes, starts, *(inputs[key] for key in forms[name].inputs))
        assert torch.equal(found, expected)
    assert calls == [registry.Backend.TRITON, registry.Backend.CUDA]


@pytest.mark.parametrize('case', [SMALL, SMALL._replace(local=False)])
def test_all_forms_compute_same_result(case):
    inputs = gpu.make_inputs(case, CPU, torch.float32)
    shapes = torch.tensor(case.shape.levels)
    starts = torch.tensor([0, 54])
    outputs = [
        form.call(shapes, starts, *(inputs[name] for name in form.inputs))
        for form in (*gpu.own_forms(), gpu.Form('', gpu.grid_sample, gpu.PLAIN))
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
    assert all((tensor != 0).all() for tensor in inputs.values())


def test_positions_are_local_and_not_near_cell_borders():
    inputs = gpu.make_inputs(SMALL, CPU, torch.float32)
    sizes = torch.tensor([(w, h) for h, w in SMALL.shape.levels], dtype=torch.float32)
    pixels = inputs['locations'] * sizes[:, None] - 0.5
    assert ((pixels - pixels.round()).abs() > 0.04).all()
    torch.testing.assert_close(inputs['points'][0, :, 0, 0][:9] * 9, torch.arange(9) + 0.5)  # queries are pixels
    distance = (pixels + 0.5 - inputs['points'][:, :, None, :, None] * sizes[:, None]).abs()
    assert distance.mean() < SMALL.shape.points + 1 and distance.max() < SMALL.shape.points + 7


def test_lower_bound_and_corner_bytes():
    shape = op.Shape('', ((5, 4),), 1, 7, heads=2, head_dim=8, points=3)
    corners = 7 * 2 * 3 * 4 * 8  # queries, heads, points, corners, channels
    assert gpu.corner_bytes(shape, torch.bfloat16, False) == corners * 2
    assert gpu.corner_bytes(shape, torch.bfloat16, True) == corners * (2 + 4)
    once = (20 + 7) * 2 * 8 * 4 + 7 * 2 * 3 * 3 * 4  # value and output, locations and weights
    slow_memory = gpu.Machine('', 'cpu', 1.0, 1e9, 0)
    assert gpu.floor_seconds(shape, torch.float32, False, slow_memory) == once
    assert gpu.floor_seconds(shape, torch.float32, False, MACHINE) == corners * 4 / 2e9


def test_backward_is_timed_without_forward_pass():
    calls = []
    timer = EventTimer(CPU, 3)
    timer.median(lambda prepared: calls.append(prepared), lambda: 'prepared')
    assert calls == ['prepared'] * 4  # the first is a warm-up run
    inputs = gpu.make_inputs(SMALL, CPU, torch.float32)
    form = gpu.own_forms()[0]
    rotation = [[inputs[name] * factor for name in form.inputs] for factor in (1, 2)]
    step = gpu._Backward(form, torch.tensor(SMALL.shape.levels), torch.tensor([0, 54]), rotation, [inputs['grad']] * 2)
    prepared = step.prepare(), step.prepare()
    assert prepared[0][0].requires_grad and not torch.equal(prepared[0][0], prepared[1][0])  # inputs alternate
    assert [grad.shape for grad in step(prepared[0])] == [tensor.shape for tensor in rotation[0]]


def test_relative_error_of_nan():
    exact = torch.ones(4, dtype=torch.float64)
    assert gpu.relative_error(torch.tensor([1, 1, 1, 1.5]), exact) == pytest.approx(0.25)
    assert not gpu.relative_error(torch.tensor([1, 1, 1, float('nan')]), exact) <= 1


def test_model_rows(capsys, monkeypatch):
    model = pytest.importorskip('msda_plugin.tools.benchmarks.model')
    seen = []

    def measured(function, args, accelerated, training, autocast):
        seen.append((accelerated, training, autocast))
        return model.Measurement(1.0 if accelerated else 2.0, 10**6, None)

    monkeypatch.setattr(model, 'in_a_process', measured)
    args = benchmark_arguments('--dry-run')
    rows = list(gpu.model_rows(args))
    assert len(rows) == 4 and len(set(seen)) == 8
    assert '2.00x' in capsys.readouterr().out


@pytest.mark.slow
def test_measures_model_with_autocast(tiny_stock_config):
    pytest.importorskip('msda_plugin.tools.benchmarks.model')
    args = argparse.Namespace(
        config=str(tiny_stock_config), device='cpu', height=128, width=128, batch=1, runs=1, threads=1
    )
    measured = gpu.measure_model(args, True, True, True)
    assert measured.seconds > 0 and measured.peak > 0
    assert not torch.is_autocast_enabled('cpu')


def benchmark_arguments(*arguments):
    parser = argparse.ArgumentParser()
    gpu.add_parser(parser.add_subparsers())
    return parser.parse_args(['gpu', *arguments])


def test_without_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert benchmark.main(['gpu']) == 2
    assert 'torch sees no GPU; --dry-run' in capsys.readouterr().out


def test_gpu_script_names_what_failed_and_goes_on(tmp_path):
    if torch.cuda.is_available():
        pytest.skip('the steps would run')
    script = Path(__file__).parents[2] / 'gpu.sh'
    environment = {**os.environ, 'PYTHON': sys.executable}
    done = subprocess.run([script, tmp_path, 'build', 'bench'], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    build, bench = (tmp_path / 'summary.txt').read_text().splitlines()
    assert build.startswith('build: exit status 1 after') and bench.startswith('bench: exit status 2 after')
    assert 'torch sees no GPU' in (tmp_path / 'bench.log').read_text()


def test_missing_mmcv_sources(capsys, tmp_path):
    with pytest.raises(FileNotFoundError, match='pip download'):
        with mmcv_kernels.unpacked(tmp_path / 'no.tar.gz'):
            pass
    with pytest.raises(FileNotFoundError, match='expected mmcv'):
        with mmcv_kernels.unpacked(tmp_path):
            pass


@pytest.mark.slow
@pytest.mark.skipif('MSDA_MMCV_SDIST' not in os.environ, reason="MSDA_MMCV_SDIST does not name mmcv's sources")
def test_mmcv_kernel_compiles(tmp_path):
    if mmcv_kernels.find_nvcc() is None:
        pytest.skip('there is no nvcc')
    mmcv_kernels.build(Path(os.environ['MSDA_MMCV_SDIST']), 'sm_90', tmp_path / 'libmmcv.so')
    kernels = mmcv_kernels.MmcvKernels(tmp_path / 'libmmcv.so')
    assert kernels.library.mmcv_forward and kernels.library.mmcv_backward


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_event_timer_measures_gpu_time():
    matrix = torch.rand(2048, 2048, device='cuda')
    timer = EventTimer(torch.device('cuda'), 5)
    once = timer.median(lambda: matrix @ matrix)
    assert 2 * once < timer.median(lambda: [matrix @ matrix for _ in range(4)]) < 8 * once


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_gpu(capsys):
    assert benchmark.main(['gpu', '--cases', 'decoder, 300', '--repeats', '3', '--skip-models']) == 0
    assert 'WRONG' not in capsys.readouterr().out

"""The CUDA kernels, run on the host by an emulator, against definitions in float64."""
import ctypes
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from operator_cases import grid_sample_attention, locations_and_weights, make_case, value_and_grads

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@pytest.fixture(scope='module')
def emulator(tmp_path_factory):
    spec = importlib.util.spec_from_file_location('csrc_build', ROOT / 'csrc' / 'build.py')
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if build.find_nvcc() is None:
        pytest.skip('there is no nvcc, whose headers the kernels include')
    library = tmp_path_factory.mktemp('emulator') / 'libemulator.so'
    subprocess.run([build.find_nvcc(), '-x', 'c++', '-std=c++20', '-O1', '-shared', '-Xcompiler=-fPIC,-w',
                    '-cudart=none',
                    str(ROOT / 'tests' / 'ops' / 'cuda_emulator.cpp'), '-o', str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def emulate(library, shapes, value, reference_points, coordinates, weights, grad, deterministic):
    """(output, gradients of the float arguments) as the binding would compute them."""
    batch, keys, heads, channels = value.shape
    queries, points = coordinates.shape[1], coordinates.shape[4]
    levels = torch.tensor(shapes)
    areas = levels.prod(1)
    starts = areas.cumsum(0) - areas
    reference_size = 0 if reference_points is None else reference_points.shape[-1]
    sizes = (ctypes.c_int64 * 10)(batch, keys, heads, channels, len(shapes), queries, points, reference_size,
                                  DTYPES[value.dtype], DTYPES[coordinates.dtype])
    inputs = pointers(value, levels, starts, reference_points, coordinates, weights)
    output = value.new_full((batch, queries, heads * channels), float('nan'))
    assert library.emulate_forward(sizes, inputs, ctypes.c_void_p(output.data_ptr())) == 0

    accumulation = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = [None if t is None else torch.full_like(t, float('nan'))
             for t in (value, reference_points, coordinates, weights)]
    wide = value.dtype == accumulation or deterministic
    scratch = [None if wide else torch.full_like(value, float('nan'), dtype=accumulation)]
    scratch += [torch.full((batch, heads, queries, len(shapes), reference_size), float('nan'), dtype=accumulation),
                torch.full_like(weights, float('nan'), dtype=accumulation)] if reference_size else [None, None]
    if not deterministic:
        scratch[2] = None
    grad = grad.to(value.dtype)
    assert library.emulate_backward(sizes, inputs, pointers(grad, *grads), pointers(*scratch), int(deterministic)) == 0
    if scratch[0] is not None:
        grads[0].copy_(scratch[0])
    return output, *(g for g in grads if g is not None)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('reference_size', [0, 2, 4])
@pytest.mark.parametrize('sizes', [
    {}, {'head_dim': 1, 'points': 1}, {'head_dim': 32, 'queries': 9}, {'head_dim': 3, 'points': 37, 'queries': 2},
    {'head_dim': 71, 'heads': 1}, {'shapes': [(12, 13), (1, 1)], 'head_dim': 16, 'queries': 70, 'batch': 1},
    {'queries': 0}], ids=str)
@pytest.mark.parametrize('dtypes', [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                    (torch.bfloat16, torch.float32), (torch.float16, torch.float16)], ids=str)
def test_against_grid_sample(emulator, deterministic, reference_size, sizes, dtypes):
    dtype, coordinate_dtype = dtypes
    case = make_case(reference_size=reference_size or 2, spread=0.5, **sizes)
    arguments = case.fused() if reference_size else case.plain()
    arguments = [arguments[0].to(dtype), *(t.to(coordinate_dtype) for t in arguments[1:])]
    batch, queries = case.locations.shape[:2]
    width = case.value[0, 0].numel()
    grad = torch.linspace(-1, 1, batch * queries * width).view(batch, queries, width).to(dtype)

    def exact(value, *rest):
        rest = locations_and_weights(case.shapes, *rest) if reference_size else rest
        return grid_sample_attention(value, case.shapes, *rest)

    expected = value_and_grads(exact, [t.double() for t in arguments], grad.double())
    reference_points = arguments[1] if reference_size else None
    actual = emulate(emulator, case.shapes, arguments[0], reference_points, *arguments[-2:], grad, deterministic)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all(), f'tensor {index}'
        scale = e.abs().max().item() if e.numel() else 1.0
        torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance * scale,
                                   msg=lambda m, i=index: f'tensor {i}: {m}')


@pytest.mark.parametrize('deterministic', [False, True])
def test_excluded_samples(emulator, deterministic):
    case = make_case(queries=9, reference_size=4)
    case.offsets[0, 3, 1, 0, 1] = torch.tensor([float('nan'), 1.0])
    case.offsets[1, 3, 1, 2, 1] = float('inf')
    case.reference_points[1, 5, 1, 2] = float('nan')
    grad = torch.ones(2, 9, 12, dtype=torch.float64)
    actual = emulate(emulator, case.shapes, *case.fused(), grad, deterministic)
    assert all(t.isfinite().all() for t in actual)
    assert (actual[3][0, 3, 1, 0, 1] == 0).all() and (actual[3][1, 5, :, 1] == 0).all()
    assert (actual[2][1, 5, 1] == 0).all()


def test_more_than_2_to_the_31_elements(emulator):
    """Behind 2^31 elements too, a row is found. Untouched zeros of numpy's take no memory."""
    keys = 2**17 + 1
    value = torch.from_numpy(np.zeros((1, keys, 128, 128), np.float16))
    value[0, -1, -1, -1] = 3
    levels, starts = torch.tensor([[1, keys]]), torch.tensor([0])
    location = torch.tensor([(keys - 0.5) / keys, 0.5]).expand(1, 1, 128, 1, 1, 2).contiguous()
    weights = torch.ones(1, 1, 128, 1, 1)
    output = value.new_full((1, 1, 128 * 128), float('nan'))
    sizes = (ctypes.c_int64 * 10)(1, keys, 128, 128, 1, 1, 1, 0, DTYPES[value.dtype], DTYPES[location.dtype])
    inputs = pointers(value, levels, starts, None, location, weights)
    assert emulator.emulate_forward(sizes, inputs, ctypes.c_void_p(output.data_ptr())) == 0
    assert value.numel() > 2**31
    assert abs(output[0, 0, -1].item() - 3) < 0.1 and output.abs().sum() < 3.1

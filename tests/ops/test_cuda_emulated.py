"""The CUDA kernels in an emulator on the host, against definitions in float64."""

import ctypes
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from operator_cases import expected_forward, grid_sample_attention, locations_and_weights, make_case, value_and_grads

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@pytest.fixture(scope='module')
def build():
    spec = importlib.util.spec_from_file_location('csrc_build', ROOT / 'csrc' / 'build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.find_nvcc() is None:
        pytest.skip('there is no nvcc, whose headers the kernels include')
    return module


def compile_host(build, *arguments):
    """Compile C++ for the host with nvcc."""
    subprocess.run(
        [
            build.find_nvcc(),
            '-x',
            'c++',
            '-std=c++20',
            '-O1',
            '-Xcompiler=-fPIC,-w',
            '-cudart=none',
            *map(str, arguments),
        ],
        check=True,
    )


@pytest.fixture(scope='module')
def emulator_object(build, tmp_path_factory):
    target = tmp_path_factory.mktemp('emulator') / 'emulator.o'
    compile_host(build, '-c', HERE / 'cuda_emulator.cpp', '-o', target)
    return target


@pytest.fixture(scope='module')
def emulator(build, emulator_object):
    path = emulator_object.with_name('libemulator.so')
    # Bound to its own stubs, although a CUDA build of torch has loaded functions of the same names.
    linked = ['-shared', '-Wl,-Bsymbolic', str(emulator_object), '-o', str(path)]
    subprocess.run([*build.find_compiler(), *linked], check=True)
    library = ctypes.CDLL(str(path))
    library.emulate_sort_elements.restype = library.emulate_reductions.restype = ctypes.c_int64
    return library


@pytest.fixture(scope='module')
def binding(build, emulator_object):
    """Build a folder in which the CPU library contains the CUDA binding and the emulated kernels."""
    torch_dir, folder = build.find_torch(), emulator_object.parent / 'binding'
    folder.mkdir()
    compile_host(
        build,
        '-DUSE_CUDA',
        *build.STABLE_ABI_FLAGS,
        '-isystem',
        torch_dir / 'include',
        '-c',
        HERE / 'cuda_binding.cpp',
        '-o',
        folder / 'binding.o',
    )
    subprocess.run(
        [
            *build.find_compiler(),
            '-shared',
            str(folder / 'binding.o'),
            str(emulator_object),
            '-o',
            str(folder / 'libmsda_cpu.so'),
            '-Wl,-Bsymbolic',
            '-Wl,--no-as-needed',
            f'-L{torch_dir / "lib"}',
            '-ltorch_cpu',
        ],
        check=True,
    )
    return folder


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


class Arguments:
    """The operator's arguments as the emulator takes them; its tensors stay in memory."""

    def __init__(self, shapes, value, reference_points, coordinates, weights, num_points=None):
        levels = torch.tensor(shapes)
        areas = levels.prod(1)
        self.tensors = value, levels, areas.cumsum(0) - areas, reference_points, coordinates, weights
        self.inputs = pointers(*self.tensors)
        batch, keys, heads, channels = value.shape
        self.output_shape = batch, coordinates.shape[1], heads * channels
        sizes = (
            *(batch, keys, heads, channels, len(shapes), coordinates.shape[1]),
            0 if num_points else coordinates.shape[4],
            0 if reference_points is None else reference_points.shape[-1],
            DTYPES[value.dtype],
            DTYPES[coordinates.dtype],
            reference_points is not None and reference_points.dtype != coordinates.dtype,
            *(num_points or []),
        )
        self.sizes = (ctypes.c_int64 * len(sizes))(*sizes)


def emulate_forward(library, arguments):
    output = arguments.tensors[0].new_full(arguments.output_shape, float('nan'))
    assert library.emulate_forward(arguments.sizes, arguments.inputs, ctypes.c_void_p(output.data_ptr())) == 0
    return output


def emulate_backward(library, arguments, grad, deterministic):
    """Return the gradients of the float arguments as the binding would compute them."""
    value, levels, _, reference_points, coordinates, weights = arguments.tensors
    batch, queries, heads = coordinates.shape[:3]
    reference_size = 0 if reference_points is None else reference_points.shape[-1]

    accumulation = torch.float64 if value.dtype == torch.float64 else torch.float32
    grads = [
        None if t is None else torch.full_like(t, float('nan')) for t in (value, reference_points, coordinates, weights)
    ]
    wide = value.dtype == accumulation or deterministic
    scratch = [None if wide else torch.full_like(value, float('nan'), dtype=accumulation)]
    parts = torch.full((batch, heads, queries, len(levels), reference_size), float('nan'), dtype=accumulation)
    scratch.append(parts if reference_size else None)
    samples = torch.full((*weights.shape, 4), float('nan'), dtype=accumulation)
    sort = torch.full((library.emulate_sort_elements(arguments.sizes),), -1, dtype=torch.int32)
    scratch += [samples, sort] if deterministic else [None, None]
    grad = grad.to(value.dtype)
    results, buffers = pointers(grad, *grads), pointers(*scratch)
    assert library.emulate_backward(arguments.sizes, arguments.inputs, results, buffers, int(deterministic)) == 0
    if scratch[0] is not None:
        grads[0].copy_(scratch[0])
    return [g for g in grads if g is not None]


def emulate(library, shapes, value, reference_points, coordinates, weights, grad, deterministic, num_points=None):
    """Return (output, gradients of the float arguments)."""
    arguments = Arguments(shapes, value, reference_points, coordinates, weights, num_points)
    return emulate_forward(library, arguments), *emulate_backward(library, arguments, grad, deterministic)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('reference_size', [0, 2, 4])
@pytest.mark.parametrize(
    'sizes',
    [
        {},
        {'head_dim': 1, 'points': 1},
        {'head_dim': 32, 'queries': 9},
        {'head_dim': 64, 'queries': 9},
        {'head_dim': 3, 'points': 37, 'queries': 2},
        {'points': [3, 6, 1], 'queries': 9},
        {'points': [2, 40, 33], 'queries': 3},  # in chunks of 32 samples
        {'head_dim': 71, 'heads': 1},
        {'head_dim': 136, 'heads': 1},
        {'shapes': [(12, 13), (1, 1)], 'head_dim': 16, 'queries': 70, 'batch': 1},
        {'shapes': [(11, 9), (3, 2), (1, 1)], 'queries': 106, 'head_dim': 8, 'batch': 1},  # an encoder's: in bands
        {
            'shapes': [(20, 15), (3, 3), (2, 3), (2, 2)],
            'queries': 350,
            'points': 4,
            'head_dim': 8,
            'heads': 1,
            'batch': 1,
        },  # sort in parts; strips of 8, 4, 2 and 1 pixels
        {'shapes': [(90, 1), (1, 9)], 'heads': 1, 'batch': 1},  # more strips than warps
        {'queries': 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    'dtypes',  # of value, coordinates and weights, reference points
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_against_grid_sample(emulator, deterministic, reference_size, sizes, dtypes):
    dtype, coordinate_dtype, reference_dtype = dtypes
    case = make_case(reference_size=reference_size or 2, spread=0.5, **sizes)
    arguments = case.fused() if reference_size else case.plain()
    arguments = [arguments[0].to(dtype), *(t.to(coordinate_dtype) for t in arguments[1:])]
    if reference_size:
        arguments[1] = case.reference_points.to(reference_dtype)
    batch, queries = case.locations.shape[:2]
    width = case.value[0, 0].numel()
    grad = torch.linspace(-1, 1, batch * queries * width).view(batch, queries, width).to(dtype)

    def exact(value, *rest):
        rest = locations_and_weights(case.shapes, *rest, case.num_points) if reference_size else rest
        return grid_sample_attention(value, case.shapes, *rest, case.num_points)

    expected = value_and_grads(exact, [t.double() for t in arguments], grad.double())
    reference_points = arguments[1] if reference_size else None
    actual = emulate(
        emulator, case.shapes, arguments[0], reference_points, *arguments[-2:], grad, deterministic, case.num_points
    )
    tolerances = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all(), f'tensor {index}'
        scale = e.abs().max().item() if e.numel() else 1.0
        torch.testing.assert_close(
            a.double(), e, rtol=0, atol=tolerances[a.dtype] * scale, msg=lambda m, i=index: f'tensor {i}: {m}'
        )


def forward_and_expected(library, case, dtype, weight_scale=1):
    """Return the plain operator's output, what is expected, and the largest error, all in float64."""
    (value, *rest), expected, error = expected_forward(case, dtype, weight_scale)
    output = emulate_forward(library, Arguments(case.shapes, value, None, *rest, case.num_points))
    return output.double(), expected, error


@pytest.mark.parametrize('capability', [7, 9])  # without and with tensor cores
@pytest.mark.parametrize('head_dim', [16, 24, 64, 72])
@pytest.mark.parametrize('points', [1, [3, 6, 1], [2, 20, 13]], ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_forward_accuracy(emulator, dtype, points, head_dim, capability):
    case = make_case(queries=5, points=points, head_dim=head_dim, spread=0.5)
    emulator.emulate_capability(capability)
    try:
        for scale in (1, -1e-5):
            output, expected, error = forward_and_expected(emulator, case, dtype, scale)
            assert ((output - expected).abs() <= error).all()
    finally:
        emulator.emulate_capability(9)


def test_forward_reads_only_corners(emulator):
    case = make_case(points=[3, 6, 1], head_dim=32)
    case.locations[..., :3, :] = 0.4 + 0.2 * case.locations[..., :3, :]  # the middle of the first level
    case.locations[..., 3:, :] = 3
    case.value[:, [0, -1]] = float('inf')
    case.value[:, 35:-1] = float('nan')
    output, expected, error = forward_and_expected(emulator, case, torch.float16)
    assert (output != 0).all() and ((output - expected).abs() <= error).all()


@pytest.mark.parametrize('head_dim', [16, 32])
def test_blocks_of_many_units(emulator, head_dim):
    """A large problem, of which only some blocks run: groups of lanes compute units one after another."""
    shapes = [(11, 9), (3, 2)]
    case = make_case(shapes=shapes, queries=105, points=2, batch=32, heads=32, head_dim=head_dim, spread=0.5)
    emulator.emulate_every_block(127)
    try:
        output, expected, error = forward_and_expected(emulator, case, torch.bfloat16)
    finally:
        emulator.emulate_every_block(1)
    computed = output.isfinite()
    assert 0.005 < computed.double().mean() < 0.05
    assert ((output - expected).abs() <= error)[computed].all()


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
    """Rows after 2^31 elements are found. NumPy's untouched zeros take no memory."""
    keys = 2**17 + 1
    value = torch.from_numpy(np.zeros((1, keys, 128, 128), np.float16))
    value[0, -1, -1, -1] = 3
    levels, starts = torch.tensor([[1, keys]]), torch.tensor([0])
    location = torch.tensor([(keys - 0.5) / keys, 0.5]).expand(1, 1, 128, 1, 1, 2).contiguous()
    weights = torch.ones(1, 1, 128, 1, 1)
    output = value.new_full((1, 1, 128 * 128), float('nan'))
    sizes = (ctypes.c_int64 * 11)(1, keys, 128, 128, 1, 1, 1, 0, DTYPES[value.dtype], DTYPES[location.dtype])
    inputs = pointers(value, levels, starts, None, location, weights)
    assert emulator.emulate_forward(sizes, inputs, ctypes.c_void_p(output.data_ptr())) == 0
    assert value.numel() > 2**31
    assert abs(output[0, 0, -1].item() - 3) < 0.1 and output.abs().sum() < 3.1


def test_no_launch_exceeds_a_block(emulator):
    """Each block has whole warps, and no more shared memory than compute capability 7.5 grants."""
    found = (ctypes.c_int64 * 9)()
    for dtype, head_dim, samples, aligned in itertools.product(
        DTYPES.values(), range(1, 257), (*range(1, 41), *range(48, 161, 8)), (0, 1)
    ):
        for reference_size in (0, 4):
            sizes = (ctypes.c_int64 * 11)(2, 20000, 8, head_dim, 1, 20000, samples, reference_size, dtype, dtype)
            assert emulator.emulate_blocks(sizes, aligned, found) == 0
            for lanes, units, shared_bytes in (found[:3], found[3:6], found[6:]):
                assert shared_bytes <= 64 * 1024 and 32 % lanes == 0, (dtype, head_dim, samples, aligned, lanes, units)
                assert lanes * units % 32 == 0 and lanes * units <= 1024, (dtype, head_dim, samples, aligned)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_in_any_order(emulator, dtype):
    case = make_case(shapes=[(9, 13), (2, 2)], queries=80, head_dim=32, points=4).to(dtype)
    arguments = Arguments(case.shapes, case.value, case.reference_points, case.offsets, case.logits)
    grad = torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(0))
    first = emulate_backward(emulator, arguments, grad, True)
    try:
        emulator.emulate_order(2)
        second = emulate_backward(emulator, arguments, grad, True)
    finally:
        emulator.emulate_order(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('head_dim', [3, 8, 71])
def test_infinite_gradient_reaches_only_corners(emulator, deterministic, head_dim):
    case = make_case(shapes=[(11, 9), (3, 2), (1, 1)], queries=20, head_dim=head_dim, dtype=torch.float32)
    grad = torch.ones(2, 20, 2 * head_dim)
    grad[:, 0] = float('inf')
    _, grad_value, *_ = emulate(emulator, case.shapes, case.value, None, *case.plain()[1:], grad, deterministic)
    sums = torch.autograd.functional.vjp(
        lambda value: grid_sample_attention(value, case.shapes, case.locations, case.weights), case.value, grad
    )[1]
    assert 0 < sums.isfinite().sum() < sums.numel()
    assert torch.equal(grad_value.isfinite(), sums.isfinite())


@pytest.mark.parametrize('deterministic', [False, True])
def test_levels_outside_the_value_are_empty(emulator, deterministic):
    """Sizes in device memory cannot be checked on the host: wrong ones must not read or write outside."""
    case = make_case(shapes=[(6, 7), (3, 4)], head_dim=8, reference_size=2)
    grad = torch.ones(*case.locations.shape[:2], case.value[0, 0].numel(), dtype=torch.float64)
    expected = emulate(emulator, case.shapes, case.value, None, *case.plain()[-2:], grad, deterministic)
    for wrong in (
        [(6, 7), (30, 40)],
        [(6, 7), (-3, -4)],
        [(6, 7), (3, 2**31 + 4)],
        [(60, 70), (3, 4)],
        [(0, 7), (9, 6)],
    ):
        output, *grads = emulate(emulator, wrong, case.value, None, *case.plain()[-2:], grad, deterministic)
        assert all(tensor.isfinite().all() for tensor in (output, *grads)), wrong
        if wrong[1] == (30, 40):
            assert grads[0][:, :42].any() and not grads[0][:, 42:].any()
    # The level that fits is not affected by the other one.
    weights = case.plain()[-1].clone()
    weights[..., 1, :] = 0
    coordinates = case.plain()[-2]
    with_one = emulate(emulator, case.shapes, case.value, None, coordinates, weights, grad, deterministic)[0]
    output = emulate(emulator, [(6, 7), (30, 40)], case.value, None, coordinates, weights, grad, deterministic)[0]
    torch.testing.assert_close(output, with_one)
    assert not torch.equal(expected[0], with_one)


def test_infinite_weight_of_excluded_sample(emulator):
    case = make_case(reference_size=2)
    locations, weights = (tensor.clone() for tensor in case.plain()[-2:])
    locations[0, 0, 0, 0, 0], weights[0, 0, 0, 0, 0] = 5.0, float('inf')
    grad = torch.ones(*locations.shape[:2], case.value[0, 0].numel(), dtype=torch.float64)
    for deterministic in (False, True):
        output, *grads = emulate(emulator, case.shapes, case.value, None, locations, weights, grad, deterministic)
        assert output.isfinite().all() and all(tensor.isfinite().all() for tensor in grads)


@pytest.mark.slow
@pytest.mark.parametrize('local, most', [(True, 0.2), (False, 0.7)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_added_up_within_a_block(emulator, dtype, local, most):
    """Reductions per row that a sample adds to, in an encoder whose queries sample around themselves or anywhere."""
    shapes, batch, heads, head_dim = [(64, 64), (32, 32), (16, 16), (8, 8)], 13, 1, 32
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
    keys = sum(h * w for h, w in shapes)
    points = torch.cat(
        [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in shapes]
    )
    sampling = (batch, keys, heads, len(shapes), 4)
    if local:
        offsets = torch.arange(1, 5)[:, None] * torch.tensor([1.0, 0.0])
        offsets = offsets + torch.randn(*sampling, 2, generator=generator)
        pixels = points[:, None, None, None] * sizes[:, None] + offsets - 0.5
    else:
        pixels = torch.rand(*sampling, 2, generator=generator) * sizes[:, None] - 0.5
    corners = torch.tensor([(0, 0), (1, 0), (0, 1), (1, 1)])
    neighbors = pixels.floor()[..., None, :] + corners
    rows = ((neighbors >= 0) & (neighbors < sizes[:, None, None])).all(-1).sum().item()
    value = torch.randn(batch, keys, heads, head_dim, generator=generator).to(dtype)
    weights = torch.full(sampling, 1 / 16)
    grad = torch.randn(batch, keys, heads * head_dim, generator=generator)
    arguments = Arguments(shapes, value, None, (pixels + 0.5) / sizes[:, None], weights)
    every = 13  # with 85 blocks per image, each part of an image once
    emulator.emulate_every_block(every)
    try:
        emulator.emulate_reductions()  # forgets those of other tests
        emulate_backward(emulator, arguments, grad, False)
    finally:
        emulator.emulate_every_block(1)
    ratio = emulator.emulate_reductions() / head_dim / (rows / every)
    assert 0.05 < ratio <= most


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('sizes', [{'batch': 0}, {'queries': 0}], ids=str)
def test_empty(emulator, deterministic, sizes):
    case = make_case(reference_size=2, **sizes)
    arguments = case.plain()
    grad = torch.ones(*arguments[1].shape[:2], case.value[:, :1].flatten(1).shape[1] or 12, dtype=torch.float64)
    output, *grads = emulate(emulator, case.shapes, arguments[0], None, *arguments[-2:], grad, deterministic)
    assert output.numel() == 0 and not any(tensor.any() for tensor in grads)


def run_with(binding, *arguments):
    environment = {**os.environ, 'MSDA_LIBRARY_DIR': str(binding), 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_failed_launches_raise(binding):
    """Any launch of the forward pass and of both backward passes, plain and fused."""
    done = run_with(binding, '-c', FAILURES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r'(\w+ (True|False) [1-9]\d*\n){4}', done.stdout), done.stdout


FAILURES = f"""
import ctypes, sys
sys.path.insert(0, {str(HERE)!r})
import torch
from operator_cases import make_case
from msda_plugin.ops import backend_for, backends, ms_deform_attn, ms_deform_attn_fused
assert 'emulated' in backend_for('cpu', torch.float32).reason
fail = ctypes.CDLL(str(backends.LIBRARY_DIR / 'libmsda_cpu.so')).emulate_failure
case = make_case(dtype=torch.float32).requires_grad()
for function, inputs in (ms_deform_attn, case.plain()), (ms_deform_attn_fused, case.fused()):
    for deterministic in False, True:
        launches = 0
        while True:
            fail(launches)
            try:
                function(inputs[0], case.shapes, None, *inputs[1:], deterministic=deterministic).sum().backward()
                break
            except RuntimeError as error:
                assert 'CUDA error 9' in str(error), error
            launches += 1
        print(function.__name__, deterministic, launches)
"""


def test_operands_on_another_device_are_refused(binding):
    done = run_with(binding, '-c', ELSEWHERE)
    assert done.returncode == 0, done.stdout + done.stderr


ELSEWHERE = f"""
import ctypes, sys
sys.path.insert(0, {str(HERE)!r})
import pytest, torch
from operator_cases import make_case
from msda_plugin.ops import backends
library = ctypes.CDLL(str(backends.LIBRARY_DIR / 'libmsda_cpu.so'))
case = make_case(dtype=torch.float32)
names = ['value', 'spatial_shapes', 'level_start_index', 'coordinates', 'weights']
levels = torch.tensor(case.shapes)
starts = levels.prod(1).cumsum(0) - levels.prod(1)
plain = [case.plain()[0], levels, starts, *case.plain()[1:]]
fused = [case.fused()[0], levels, starts, *case.fused()[1:]]
grad = torch.ones(*case.locations.shape[:2], case.value[0, 0].numel())
for operator, operands, names in (
    (torch.ops.msda.ms_deform_attn, plain, names),
    (torch.ops.msda.ms_deform_attn_fused, fused, [*names[:3], 'reference_points', *names[3:]]),
    (torch.ops.msda.ms_deform_attn_backward, [grad, *plain], ['grad_output', *names]),
):
    for operand, name in zip(operands, names, strict=True):
        if name == 'value':
            continue
        library.emulate_elsewhere(ctypes.c_void_p(operand.data_ptr()))
        with pytest.raises(RuntimeError, match=f'{{name}} must be on the device of value'):
            operator(*operands, False, [])
    library.emulate_elsewhere(None)
    operator(*operands, False, [])
"""


def test_binding(binding):
    """Run the operator's tests with the CUDA binding and kernels in place of the CPU ones."""
    chosen = (
        'portable and (dtypes or non_contiguous or unaligned or empty or level_forms or excluded or extreme or '
        'never_read or nan_reaches)'
    )
    done = run_with(binding, '-m', 'pytest', '-p', 'no:cacheprovider', 'tests/ops/test_operator.py', '-k', chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 15

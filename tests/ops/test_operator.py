"""The operator against definitions in float64, on every backend and instruction set."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import grid_sample_attention, locations_and_weights, make_case, value_and_grads

from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_reference, use_backend

HAS_CPU = backend_for('cpu', torch.float32).name == 'cpu'
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason='libmsda_cpu is not built')
BACKENDS = ['reference', *(pytest.param(isa, marks=needs_cpu) for isa in ('avx512', 'avx2', 'portable'))]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The reference, and the CPU kernels with each instruction set. Machines without it use the next smaller one."""
    if request.param != 'reference':
        monkeypatch.setenv('MSDA_CPU_ISA', request.param)
    with use_backend('reference' if request.param == 'reference' else 'cpu'):
        yield request.param


def assert_all_close(actual, expected, rtol=1e-9, atol=1e-10):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e.to(a), rtol=rtol, atol=atol, msg=lambda m, i=index: f'tensor {i}: {m}')


def plain_pair(case):
    points = case.num_points
    actual = value_and_grads(
        lambda v, p, w: ms_deform_attn(v, case.shapes, None, p, w, num_points=points), case.plain()
    )
    expected = value_and_grads(lambda v, p, w: grid_sample_attention(v, case.shapes, p, w, points), case.plain())
    return actual, expected


def fused_pair(case):
    points = case.num_points
    actual = value_and_grads(
        lambda v, *rest: ms_deform_attn_fused(v, case.shapes, None, *rest, num_points=points), case.fused()
    )
    expected = value_and_grads(
        lambda v, *rest: grid_sample_attention(
            v, case.shapes, *locations_and_weights(case.shapes, *rest, points), points
        ),
        case.fused(),
    )
    return actual, expected


cases = st.builds(
    make_case,
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    batch=st.integers(0, 3),
    queries=st.integers(0, 70),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    points=st.integers(1, 6),
    reference_size=st.sampled_from([2, 4]),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0, 0.1, 1.0]),
)


@given(case=cases)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_plain_equals_grid_sample(case):
    assert_all_close(*plain_pair(case))


@given(case=cases)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_fused_equals_its_parts(case):
    assert_all_close(*fused_pair(case))


@pytest.mark.parametrize('head_dim', [1, 3, 8, 16, 24, 30, 32, 48, 64, 71, 96, 136])
@pytest.mark.parametrize('queries', [5, 90])
def test_head_dims(backend, head_dim, queries):
    case = make_case(head_dim=head_dim, queries=queries)
    assert_all_close(*plain_pair(case))
    assert_all_close(*fused_pair(case))


@pytest.mark.parametrize('points', [1, 4, 8, 37])
def test_points(backend, points):
    case = make_case(points=points, queries=9, reference_size=4)
    assert_all_close(*plain_pair(case))
    assert_all_close(*fused_pair(case))


@pytest.mark.parametrize('reference_size', [2, 4])
@pytest.mark.parametrize('points', [[3, 6, 1], [2, 40, 33], [4, 4, 4]], ids=str)
def test_points_per_level(backend, points, reference_size):
    case = make_case(points=points, queries=9, reference_size=reference_size, head_dim=16)
    assert case.logits.shape == (2, 9, 2, sum(points))
    assert_all_close(*plain_pair(case))
    assert_all_close(*fused_pair(case))


@pytest.mark.parametrize('reference_size', [2, 4])
def test_excluded_samples_with_points_per_level(backend, reference_size):
    case = make_case(points=[3, 6, 1], reference_size=reference_size)
    case.locations[0, 0, 0, 2] = 7.0
    case.offsets[0, 0, 0, 5] = float('nan')
    output, *grads = value_and_grads(
        lambda v, *rest: ms_deform_attn_fused(v, case.shapes, None, *rest, num_points=case.num_points), case.fused()
    )
    assert all(t.isfinite().all() for t in (output, *grads)) and (grads[2][0, 0, 0, 5] == 0).all()
    assert_all_close(*plain_pair(case))


def test_more_levels_than_uneven_ones(backend):
    """Equal numbers on any number of levels; different numbers on up to 16."""
    for points, levels in (([2] * 20, 20), ([1] * 15 + [3], 16)):
        case = make_case(shapes=[(2, 3)] * levels, points=points)
        assert_all_close(*plain_pair(case))
        assert_all_close(*fused_pair(case))


def test_reference_form_with_points_per_level():
    case = make_case(points=[3, 6, 1])
    actual = ms_deform_attn_reference(
        case.value, case.shapes, None, case.locations, case.weights, num_points=case.num_points
    )
    torch.testing.assert_close(
        actual, grid_sample_attention(case.value, case.shapes, case.locations, case.weights, case.num_points)
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('wide', ['coordinates', 'reference points', 'nothing'])
@pytest.mark.parametrize('reference_size', [2, 4])
def test_dtypes(backend, dtype, wide, reference_size):
    """A 16-bit result is at most twice as far from float64 as plain PyTorch in that dtype; float32 is exact to 1e-5."""
    case = make_case(shapes=[(9, 11), (4, 5)], queries=30, head_dim=32, points=4, reference_size=reference_size)
    for arguments, native, plain in (
        (
            case.plain(),
            lambda v, *rest: ms_deform_attn(v, case.shapes, None, *rest),
            lambda v, *rest: grid_sample_attention(v, case.shapes, *rest),
        ),
        (
            case.fused(),
            lambda v, *rest: ms_deform_attn_fused(v, case.shapes, None, *rest),
            lambda v, *rest: grid_sample_attention(v, case.shapes, *locations_and_weights(case.shapes, *rest)),
        ),
    ):
        value, *rest = arguments
        low = [value.to(dtype), *(t.to(torch.float32 if wide == 'coordinates' else dtype) for t in rest)]
        if wide == 'reference points' and len(rest) == 3:
            low[1] = rest[0].float()
        exact = value_and_grads(plain, [t.double() for t in low])
        actual = value_and_grads(native, low)
        assert [t.dtype for t in actual[1:]] == [t.dtype for t in low]
        naive = value_and_grads(plain, [t.to(dtype) for t in low])
        for index, (a, n, e) in enumerate(zip(actual, naive, exact, strict=True)):
            scale = e.abs().max()
            error = (a.double() - e).abs().max() / scale
            if dtype == torch.float32:
                assert error < 1e-5, f'tensor {index}: {error}'
            else:
                assert error <= 2 * (n.double() - e).abs().max() / scale, f'tensor {index}'


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 1e30, -7.0, 3e9])
@pytest.mark.parametrize('reference_size', [2, 4])
def test_excluded_samples(backend, bad, reference_size):
    """NaN, infinite and far locations contribute nothing, get gradient 0, and change nothing else."""
    case = make_case(queries=20, reference_size=reference_size)
    clean = make_case(queries=20, reference_size=reference_size)
    case.locations[0, 3, 1, 0, 1, 0] = bad
    case.locations[1, 7, 0, 2, 2, :] = bad
    for index in ((0, 3, 1, 0, 1), (1, 7, 0, 2, 2)):
        clean.weights[index] = 0
        clean.locations[index] = 0.5
    actual = value_and_grads(lambda v, p, w: ms_deform_attn(v, case.shapes, None, p, w), case.plain())
    expected = value_and_grads(lambda v, p, w: grid_sample_attention(v, case.shapes, p, w), clean.plain())
    assert (actual[2][0, 3, 1, 0, 1] == 0).all() and (actual[2][1, 7, 0, 2, 2] == 0).all()
    assert actual[3][0, 3, 1, 0, 1] == 0 and actual[3][1, 7, 0, 2, 2] == 0
    for index in ((0, 3, 1, 0, 1), (1, 7, 0, 2, 2)):
        expected[3][index] = 0
    assert_all_close(actual, expected)

    case.offsets[0, 3, 1, 0, 1, 1] = bad
    case.reference_points[1, 5, 2] = bad
    results = value_and_grads(lambda v, *rest: ms_deform_attn_fused(v, case.shapes, None, *rest), case.fused())
    assert all(t.isfinite().all() for t in results)
    assert (results[3][0, 3, 1, 0, 1] == 0).all() and (results[3][1, 5, :, 2] == 0).all()
    assert (results[2][1, 5, 2] == 0).all()


def test_infinite_weight_of_an_excluded_sample(backend):
    case, clean = make_case(), make_case()
    for each, weight in ((case, float('inf')), (clean, 0)):
        each.locations[0, 0, 0, 0, 0], each.weights[0, 0, 0, 0, 0] = 5.0, weight
    actual = value_and_grads(lambda v, p, w: ms_deform_attn(v, case.shapes, None, p, w), case.plain())
    expected = value_and_grads(lambda v, p, w: grid_sample_attention(v, case.shapes, p, w), clean.plain())
    assert_all_close(actual, expected)


def test_value_outside_a_level_is_never_read(backend):
    """Infinite and NaN pixels next to a level's border, on other levels and for excluded samples do not leak."""
    case = make_case(shapes=[(3, 4), (2, 2)], points=1, queries=6, spread=0)
    case.value[:, 12:] = float('nan')  # level 1
    case.value[:, 0] = float('inf')  # the first row
    case.locations[:, :, :, 1] = -3.0
    case.locations[:, :, :, 0] = torch.tensor([1.01, 0.9])  # half outside on the right
    case.weights[:, :, :, 1] = 1
    output = ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights)
    assert output.isfinite().all()


def test_nan_reaches_the_output(backend):
    case = make_case(shapes=[(3, 4)], spread=0)
    case.value[0, :, 0] = float('nan')
    output = ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights)
    assert output[0, :, :6].isnan().all() and output[0, :, 6:].isfinite().all()
    logits = case.logits.clone()
    logits[1, 2, 1, 0, 0] = float('nan')
    case.value[0] = 0
    output = ms_deform_attn_fused(case.value, case.shapes, None, case.reference_points, case.offsets * 0, logits)
    assert output[1, 2, 6:].isnan().all() and output.isnan().sum() == 6


def test_extreme_logits(backend):
    case = make_case(queries=9)
    case.logits[:] = case.logits * 200
    case.logits[0, 0, 0, 0, 0] = -float('inf')
    assert_all_close(*fused_pair(case))
    low = case.to(torch.float32)
    expected = grid_sample_attention(case.value, case.shapes, *locations_and_weights(case.shapes, *case.fused()[1:]))
    actual = ms_deform_attn_fused(low.value, low.shapes, None, *low.fused()[1:])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_non_contiguous_and_expanded(backend):
    case = make_case(queries=11, heads=3)
    value = case.value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    locations = torch.stack([case.locations, case.locations], -1)[..., 0]
    weights = case.weights[:1].expand(2, -1, -1, -1, -1)
    shapes = torch.tensor(case.shapes)[:, [1, 0]].flip(1)
    assert not value.is_contiguous() and not locations.is_contiguous() and not weights.is_contiguous()
    inputs = (value, locations, weights)
    actual = value_and_grads(lambda v, p, w: ms_deform_attn(v, shapes, None, p, w), inputs)
    expected = value_and_grads(lambda v, p, w: grid_sample_attention(v, case.shapes, p, w), inputs)
    assert_all_close(actual, expected)
    value = case.value.clone().requires_grad_()  # the gradient of a sum is expanded, without memory of its own
    ms_deform_attn(value, case.shapes, None, case.locations, case.weights).sum().backward()
    expected = case.value.clone().requires_grad_()
    grid_sample_attention(expected, case.shapes, case.locations, case.weights).sum().backward()
    torch.testing.assert_close(value.grad, expected.grad)


def test_unaligned_memory(backend):
    case = make_case(queries=9, head_dim=16, dtype=torch.float32)
    value = torch.empty(case.value.numel() + 1)[1:].view_as(case.value).copy_(case.value)
    expected = grid_sample_attention(case.value, case.shapes, case.locations, case.weights)
    torch.testing.assert_close(ms_deform_attn(value, case.shapes, None, case.locations, case.weights), expected)


@pytest.mark.parametrize(
    'dtype, head_dim',
    [(torch.float32, 32), (torch.float64, 8), (torch.bfloat16, 32), (torch.float16, 24), (torch.float32, 36)],
    ids=str,
)
def test_outputs_larger_than_the_caches(backend, dtype, head_dim):
    """Large outputs bypass the caches. Each query's result equals that in a small output."""
    queries = 9 * 2**20 // (2 * head_dim * dtype.itemsize)
    case = make_case([(5, 7), (3, 2)], batch=1, queries=queries, heads=2, head_dim=head_dim, points=1, dtype=dtype)
    large = ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights)
    for some in (slice(0, 2), slice(queries // 2, queries // 2 + 61), slice(queries - 7, queries)):
        small = ms_deform_attn(case.value, case.shapes, None, case.locations[:, some], case.weights[:, some])
        torch.testing.assert_close(large[:, some], small, rtol=1e-6, atol=1e-6 if dtype.itemsize > 2 else 1e-2)
    assert large.isfinite().all()


@pytest.mark.parametrize('size', [{'batch': 0}, {'queries': 0}, {'batch': 0, 'queries': 0}])
def test_empty(backend, size):
    case = make_case(**size)
    for actual, expected in (plain_pair(case), fused_pair(case)):
        assert_all_close(actual, expected)
    assert plain_pair(case)[0][1].abs().sum() == 0


@needs_cpu
def test_more_than_2_to_the_31_elements():
    """Rows after 2^31 elements are found. NumPy's untouched zeros take no memory."""
    keys = 2**17 + 1
    value = torch.from_numpy(np.zeros((1, keys, 128, 128), np.float16))
    value[0, -1, -1, -1] = 3
    location = torch.tensor([(keys - 0.5) / keys, 0.5]).expand(1, 1, 128, 1, 1, 2)
    output = ms_deform_attn(value, [(1, keys)], None, location, torch.ones(1, 1, 128, 1, 1))
    assert value.numel() > 2**31
    assert abs(output[0, 0, -1].item() - 3) < 0.1 and output.abs().sum() < 3.1


def test_level_forms(backend):
    """Shapes as pairs or as int64 or int32 tensors, with and without level_start_index."""
    case = make_case()
    shapes = torch.tensor(case.shapes)
    starts = torch.tensor([0, 35, 41])
    forms = (case.shapes, tuple(map(list, case.shapes)), shapes, shapes.int())
    outputs = [
        ms_deform_attn(case.value, form, start, case.locations, case.weights)
        for form in forms
        for start in (None, starts, starts.int())
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_mixed_dtypes_are_not_rounded_to_half(backend):
    """A float32 location keeps its precision with a 16-bit value."""
    value = torch.arange(4096, dtype=torch.float32).view(1, 4096, 1, 1).half()
    location = torch.tensor([1000.25 / 4096, 0.5]).view(1, 1, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(1, 4096)], None, location, torch.ones(1, 1, 1, 1, 1))
    assert output.dtype == torch.float16 and output.item() == 1000  # half: nearest to 999.75
    location = location.half().float()
    assert ms_deform_attn(value, [(1, 4096)], None, location, torch.ones(1, 1, 1, 1, 1)).item() != 1000
    weights = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    ms_deform_attn(value, [(1, 4096)], None, location, weights).sum().backward()
    assert weights.grad.dtype == torch.float64


@pytest.mark.parametrize('points', [2, [1, 3, 2]], ids=str)
@pytest.mark.parametrize('fused', [0, 2, 4], ids=['plain', 'points', 'boxes'])
def test_gradcheck_and_gradgradcheck(backend, fused, points):
    case = make_case(batch=1, queries=2, head_dim=3, points=points, reference_size=fused or 2, seed=3).requires_grad()
    operator, inputs = (ms_deform_attn_fused, case.fused()) if fused else (ms_deform_attn, case.plain())

    def function(value, *rest):
        return operator(value, case.shapes, None, *rest, num_points=case.num_points)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize('head_dim', [30, 32, 64, 71, 1025, 2048, 3096])
def test_published_gradcheck(head_dim):
    """The head dims and sizes of the gradient checks in the published implementation."""
    case = make_case(shapes=[(6, 4), (3, 2)], batch=1, queries=2, heads=2, head_dim=head_dim, points=2, spread=0)
    case.weights.div_(case.weights.sum((-1, -2), keepdim=True))
    case.requires_grad()
    assert torch.autograd.gradcheck(
        lambda v, p, w: ms_deform_attn(v, case.shapes, None, p, w), case.plain(), fast_mode=head_dim > 32
    )


def test_published_forward():
    """The output checks of the published implementation: close in float64, rtol 1e-2 and atol 1e-3 in float32."""
    case = make_case(shapes=[(6, 4), (3, 2)], batch=1, queries=2, heads=2, head_dim=2, points=2, spread=0)
    expected = grid_sample_attention(case.value, case.shapes, case.locations, case.weights)
    for dtype, tolerance in ((torch.float64, {}), (torch.float32, {'rtol': 1e-2, 'atol': 1e-3})):
        value, locations, weights = case.to(dtype).plain()
        actual = ms_deform_attn(value, case.shapes, None, locations, weights)
        torch.testing.assert_close(actual, expected.to(dtype), **tolerance)


def test_reference_form():
    case = make_case()
    expected = grid_sample_attention(case.value, case.shapes, case.locations, case.weights)
    actual = ms_deform_attn_reference(case.value, case.shapes, None, case.locations, case.weights, deterministic=True)
    torch.testing.assert_close(actual, expected)


@needs_cpu
def test_scratch_memory_does_not_grow_with_the_samples():
    """Scratch memory of forward and backward is the same for 64 times the samples."""
    status = Path('/proc/self/status')
    if not status.exists():
        pytest.skip('there is no /proc/self/status to read the peak memory from')

    def bytes_of(key):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024

    extra = []
    for queries, points in ((500, 1), (4000, 8)):
        case = make_case(
            shapes=[(20, 30), (10, 15)],
            batch=1,
            queries=queries,
            heads=8,
            head_dim=16,
            points=points,
            dtype=torch.float32,
        )
        levels = (torch.tensor(case.shapes), torch.tensor([0, 600]))
        inputs = (case.value, *levels, *case.fused()[1:])
        results = []
        for _ in range(2):  # what is loaded on first use is no part of it
            del results[:]
            try:
                Path('/proc/self/clear_refs').write_text('5')  # resets the peak
            except OSError as error:
                pytest.skip(f'the peak memory cannot be reset: {error}')
            before = bytes_of('VmRSS')
            results.append(torch.ops.msda.ms_deform_attn_fused(*inputs, False, []))
            results += torch.ops.msda.ms_deform_attn_fused_backward(results[0], *inputs, False, [])
            used = bytes_of('VmHWM') - before
        extra.append(used - sum(t.nbytes for t in results))
    assert extra[1] < max(extra[0], 0) + 4 * 2**20


@needs_cpu
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('queries', [7, 333])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('points', [3, [2, 5]], ids=str)
def test_bitwise_equal_for_any_number_of_threads(batch, queries, dtype, points):
    case = make_case(
        shapes=[(12, 13), (5, 6)],
        batch=batch,
        queries=queries,
        head_dim=32,
        dtype=dtype,
        reference_size=4,
        points=points,
    )
    plain, fused = (partial(f, num_points=case.num_points) for f in (ms_deform_attn, ms_deform_attn_fused))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            results.append(
                value_and_grads(lambda v, p, w: plain(v, case.shapes, None, p, w), case.plain())
                + value_and_grads(lambda v, *rest: fused(v, case.shapes, None, *rest), case.fused())
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

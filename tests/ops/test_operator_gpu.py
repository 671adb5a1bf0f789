"""The CUDA kernels against definitions in float64, on a GPU."""

import pytest
import torch
from operator_cases import expected_forward, grid_sample_attention, locations_and_weights, make_case, value_and_grads

from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused, use_backend

if not torch.cuda.is_available():
    pytest.skip('there is no GPU', allow_module_level=True)
if backend_for('cuda', torch.float32).name != 'cuda':
    pytest.skip(backend_for('cuda', torch.float32).reason, allow_module_level=True)

DEVICES = [f'cuda:{index}' for index in range(torch.cuda.device_count())]


def pairs(case, deterministic, dtype=torch.float64, coordinate_dtype=torch.float64):
    """Return (actual, expected) of the plain and of the fused form."""
    for arguments, native, exact in (
        (
            case.plain(),
            lambda v, *rest: ms_deform_attn(v, case.shapes, None, *rest, deterministic=deterministic),
            lambda v, *rest: grid_sample_attention(v, case.shapes, *rest),
        ),
        (
            case.fused(),
            lambda v, *rest: ms_deform_attn_fused(v, case.shapes, None, *rest, deterministic=deterministic),
            lambda v, *rest: grid_sample_attention(v, case.shapes, *locations_and_weights(case.shapes, *rest)),
        ),
    ):
        low = [arguments[0].to(dtype), *(t.to(coordinate_dtype) for t in arguments[1:])]
        yield value_and_grads(native, low), value_and_grads(exact, [t.double() for t in low])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('head_dim', [1, 3, 8, 30, 32, 64, 71, 300])
@pytest.mark.parametrize('points, reference_size', [(1, 2), (4, 4), (50, 2)])
def test_float64(device, deterministic, head_dim, points, reference_size):
    case = make_case(head_dim=head_dim, points=points, queries=35, reference_size=reference_size, spread=0.5).to(device)
    for actual, expected in pairs(case, deterministic):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize(
    'dtype, coordinate_dtype, tolerance',
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float16, torch.float32, 2e-3),
        (torch.float16, torch.float16, 4e-3),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 4e-2),
    ],
)
@pytest.mark.parametrize('head_dim', [32, 64])
def test_dtypes(deterministic, head_dim, dtype, coordinate_dtype, tolerance):
    case = make_case(shapes=[(9, 11), (4, 5)], queries=60, head_dim=head_dim, points=4).to('cuda')
    for actual, expected in pairs(case, deterministic, dtype, coordinate_dtype):
        for a, e in zip(actual, expected, strict=True):
            assert (a.double() - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize('points', [1, 4, [3, 6]], ids=str)
@pytest.mark.parametrize('head_dim', [16, 24, 32, 64, 72])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_forward_accuracy(dtype, head_dim, points):
    """On tensor cores up to 64 channels; a group of lanes computes several queries if there are so many."""
    shapes = [(70, 60), (9, 11)]
    case = make_case(shapes, queries=4299, heads=8, head_dim=head_dim, points=points, spread=0.5).to('cuda')
    for scale in (1, -1e-5):
        inputs, expected, error = expected_forward(case, dtype, scale)
        output = ms_deform_attn(inputs[0], shapes, None, *inputs[1:], num_points=case.num_points)
        assert ((output.double() - expected).abs() <= error).all()


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize(
    'size',
    [
        {'shapes': [(21, 13), (4, 5), (1, 1)], 'queries': 294},  # an encoder's queries: taken in bands
        {'shapes': [(1, 1)], 'queries': 5000},  # all samples on one pixel
        {'shapes': [(300, 250), (3, 2)], 'queries': 900, 'batch': 1},  # keys of three digits
        {'shapes': [(500, 1), (3, 3), (2, 3), (2, 2)], 'queries': 350},  # strips of 1, 4, 2 and 1 pixels
    ],
)
def test_sizes(deterministic, size):
    case = make_case(head_dim=16, points=4, **size).to('cuda')
    for actual, expected in pairs(case, deterministic):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e30])
def test_excluded_samples(bad):
    case = make_case(queries=20, reference_size=4).to('cuda')
    case.locations[0, 3, 1, 0, 1, 0] = case.offsets[0, 3, 1, 0, 1, 1] = bad
    for deterministic in (False, True):
        with use_backend('reference'):
            expected = [actual for actual, _ in pairs(case, deterministic)]
        for (actual, _), other in zip(pairs(case, deterministic), expected, strict=True):
            for a, e in zip(actual, other, strict=True):
                assert a.isfinite().all()
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize('size', [{'batch': 0}, {'queries': 0}])
@pytest.mark.parametrize('deterministic', [False, True])
def test_empty(size, deterministic):
    for actual, expected in pairs(make_case(**size).to('cuda'), deterministic):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_deterministic_runs_are_bitwise_equal(dtype):
    case = make_case(shapes=[(6, 6), (2, 2)], queries=3000, head_dim=32, points=4).to('cuda')
    runs = [[actual for actual, _ in pairs(case, True, dtype, torch.float32)] for _ in range(3)]
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cuda_graph():
    case = make_case(dtype=torch.float32, head_dim=32).to('cuda')
    shapes = torch.tensor(case.shapes, device='cuda')

    def step():
        return ms_deform_attn_fused(case.value, shapes, None, case.reference_points, case.offsets, case.logits)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    graph.replay()
    torch.testing.assert_close(output, expected)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip('needs 12 GB of GPU memory')
    value = torch.zeros(1, 2**17 + 1, 128, 130, dtype=torch.float16, device='cuda')
    value[0, -1, -1, -1] = 3
    location = torch.tensor([(2**17 + 0.5) / (2**17 + 1), 0.5], device='cuda').expand(1, 1, 128, 1, 1, 2)
    output = ms_deform_attn(value, [(1, 2**17 + 1)], None, location, torch.ones(1, 1, 128, 1, 1, device='cuda'))
    assert abs(output[0, 0, -1].item() - 3) < 0.1 and output.abs().sum() < 3.1


def test_reference_points_of_another_dtype():
    """As under autocast: 16-bit offsets and logits, float32 reference points, and nothing is converted."""
    case = make_case(shapes=[(9, 11), (4, 5)], queries=60, head_dim=32, points=4).to('cuda')
    value, points, *rest = case.fused()
    low = [value.bfloat16(), points.float(), *(tensor.bfloat16() for tensor in rest)]
    actual = value_and_grads(lambda v, *rest: ms_deform_attn_fused(v, case.shapes, None, *rest), low)
    expected = value_and_grads(
        lambda v, *rest: grid_sample_attention(v, case.shapes, *locations_and_weights(case.shapes, *rest)),
        [tensor.double() for tensor in low],
    )
    assert [tensor.dtype for tensor in actual[1:]] == [tensor.dtype for tensor in low]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=4e-2 * e.abs().max().item())


def test_operands_on_the_host_are_refused():
    case = make_case(dtype=torch.float32).to('cuda')
    levels = torch.tensor(case.shapes)
    starts = levels.prod(1).cumsum(0) - levels.prod(1)
    with pytest.raises(RuntimeError, match='spatial_shapes must be on the device of value'):
        torch.ops.msda.ms_deform_attn(case.value, levels, starts, *case.plain()[1:], False, [])


@pytest.mark.parametrize('deterministic', [False, True])
def test_levels_outside_the_value_are_empty(deterministic):
    case = make_case(shapes=[(6, 7), (3, 4)], head_dim=8, dtype=torch.float32).to('cuda').requires_grad()
    for wrong in ([(6, 7), (30, 40)], [(6, 7), (-3, -4)], [(60, 70), (3, 4)], [(1 << 20, 1 << 20), (3, 4)]):
        output = ms_deform_attn(case.value, wrong, None, *case.plain()[1:], deterministic=deterministic)
        grads = torch.autograd.grad(output.sum(), case.plain())
        assert all(tensor.isfinite().all() for tensor in (output, *grads)), wrong


def test_infinite_weight_of_an_excluded_sample():
    case = make_case(dtype=torch.float32).to('cuda')
    case.locations[0, 0, 0, 0, 0], case.weights[0, 0, 0, 0, 0] = 5.0, float('inf')
    assert ms_deform_attn(case.value, case.shapes, None, *case.plain()[1:]).isfinite().all()

"""Invalid arguments: the error names the argument, what it is, and what is needed."""

import pytest
import torch
from operator_cases import make_case

from msda_plugin.ops import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_reference
from msda_plugin.ops.checks import check_levels

PLAIN = ('value', 'spatial_shapes', 'level_start_index', 'sampling_locations', 'attention_weights')
FUSED = ('value', 'spatial_shapes', 'level_start_index', 'reference_points', 'sampling_offsets', 'attention_logits')


def arguments(names):
    case = make_case(dtype=torch.float32)  # 2 images, 42 keys, 4 queries, 2 heads, 3 levels, 3 points
    levels = (torch.tensor(case.shapes), torch.tensor([0, 35, 41]))
    rest = case.plain()[1:] if names is PLAIN else case.fused()[1:]
    return dict(zip(names, (case.value, *levels, *rest), strict=True))


def raises(function, names, error, match, **changes):
    given = arguments(names)
    given.update({name: change(given[name]) if callable(change) else change for name, change in changes.items()})
    with pytest.raises(error, match=match):
        function(*given.values())


@pytest.mark.parametrize(
    'error, match, changes',
    [
        (TypeError, r'value is a list, but a tensor', {'value': [1.0]}),
        (ValueError, r'value has shape \(2, 42, 12\)', {'value': lambda t: t.flatten(2)}),
        (TypeError, r'value has dtype torch.int64.*value.float', {'value': lambda t: t.long()}),
        (ValueError, r'value has shape \(2, 42, 2, 0\).*at least 1', {'value': lambda t: t[..., :0]}),
        (
            ValueError,
            r'spatial_shapes is \[\[5, 7\], \[3, 2\], \[1, 1\]\], whose areas add up to 42.*num_keys = 41',
            {'value': lambda t: t[:, 1:]},
        ),
        (
            ValueError,
            r'spatial_shapes is .*, but every level needs h >= 1',
            {'spatial_shapes': [(6, 7), (0, 2), (1, 0)]},
        ),
        (ValueError, r'spatial_shapes has shape \(0, 2\).*at least one level', {'spatial_shapes': lambda t: t[:0]}),
        (ValueError, r'spatial_shapes has shape', {'spatial_shapes': []}),
        (ValueError, r'spatial_shapes has shape \(6,\)', {'spatial_shapes': lambda t: t.flatten()}),
        (TypeError, r'spatial_shapes has dtype torch.float32.*long', {'spatial_shapes': lambda t: t.float()}),
        (TypeError, r'spatial_shapes is \(5, 7\), but', {'spatial_shapes': (5, 7)}),
        (TypeError, r'spatial_shapes is .*must be integers', {'spatial_shapes': [(5.0, 7), (3, 2), (1, 1)]}),
        (ValueError, r'spatial_shapes is on meta, but value is on cpu', {'spatial_shapes': lambda t: t.to('meta')}),
        (TypeError, r'level_start_index is a list', {'level_start_index': [0, 35, 41]}),
        (ValueError, r'level_start_index has shape \(2,\), but \(3,\)', {'level_start_index': lambda t: t[:2]}),
        (TypeError, r'level_start_index has dtype torch.float32', {'level_start_index': lambda t: t.float()}),
        (ValueError, r'level_start_index is \[0, 36, 41\]', {'level_start_index': torch.tensor([0, 36, 41])}),
        (ValueError, r'level_start_index is \[0, 0, 0\]', {'level_start_index': torch.tensor([0, 0, 0])}),
    ],
)
@pytest.mark.parametrize(
    'function, names', [(ms_deform_attn, PLAIN), (ms_deform_attn_fused, FUSED), (ms_deform_attn_reference, PLAIN)]
)
def test_value_and_levels(function, names, error, match, changes):
    raises(function, names, error, match, **changes)


@pytest.mark.parametrize(
    'error, match, changes',
    [
        (
            ValueError,
            r'sampling_locations has shape \(2, 4, 2, 3, 3\), but \(bs, num_queries',
            {'sampling_locations': lambda t: t[..., 0]},
        ),
        (
            ValueError,
            r'sampling_locations has shape \(2, 4, 2, 2, 3, 2\).*\(2, 4, 2, 3, 3, 2\)',
            {'sampling_locations': lambda t: t[:, :, :, :2]},
        ),
        (ValueError, r'sampling_locations has shape \(1, 4, 2, 3, 3, 2\)', {'sampling_locations': lambda t: t[:1]}),
        (
            ValueError,
            r'sampling_locations has shape .*num_points >= 1',
            {'sampling_locations': lambda t: t[..., :0, :]},
        ),
        (TypeError, r'sampling_locations has dtype torch.int32', {'sampling_locations': lambda t: t.int()}),
        (ValueError, r'sampling_locations is on meta', {'sampling_locations': lambda t: t.to('meta')}),
        (
            ValueError,
            r'attention_weights has shape \(2, 3, 2, 3, 3\).*\(2, 4, 2, 3, 3\)',
            {'attention_weights': lambda t: t[:, :3]},
        ),
        (TypeError, r'attention_weights is a NoneType', {'attention_weights': None}),
    ],
)
def test_plain(error, match, changes):
    raises(ms_deform_attn, PLAIN, error, match, **changes)


@pytest.mark.parametrize(
    'error, match, changes',
    [
        (ValueError, r'reference_points has shape \(2, 4, 3, 1\).*2 or 4', {'reference_points': lambda t: t[..., :1]}),
        (ValueError, r'reference_points has shape \(2, 4, 2\)', {'reference_points': lambda t: t[:, :, 0]}),
        (ValueError, r'reference_points has shape \(2, 4, 1, 2\).*repeat', {'reference_points': lambda t: t[:, :, :1]}),
        (TypeError, r'reference_points has dtype torch.int64', {'reference_points': lambda t: t.long()}),
        (ValueError, r'sampling_offsets has shape', {'sampling_offsets': lambda t: t[..., :1]}),
        (ValueError, r'attention_logits has shape \(2, 4, 2, 9\)', {'attention_logits': lambda t: t.flatten(-2)}),
    ],
)
def test_fused(error, match, changes):
    raises(ms_deform_attn_fused, FUSED, error, match, **changes)


@pytest.mark.parametrize('function, names', [(ms_deform_attn, PLAIN), (ms_deform_attn_fused, FUSED)])
@pytest.mark.parametrize(
    'num_points, match',
    [
        ([3, 3], r'num_points is \[3, 3\], but a list of 3 integers >= 1 .*one for each level'),
        ([4, 0, 5], r'num_points is \[4, 0, 5\]'),
        ([4, 2.5, 2.5], r'num_points is \[4, 2.5, 2.5\]'),
        (9, r'num_points is 9'),
        ([4, 3, 1], r'sampling_\w+ has shape \(2, 4, 2, 9, 2\).*sum\(num_points\), 2\) = \(2, 4, 2, 8, 2\)'),
    ],
)
def test_num_points(function, names, num_points, match):
    given = list(arguments(names).values())
    given[-2:] = given[-2].flatten(3, 4), given[-1].flatten(3)  # 9 points
    with pytest.raises(ValueError, match=match):
        function(*given, num_points=num_points)
    function(*given, num_points=[4, 3, 2])
    with pytest.raises(ValueError, match=r'\w+ has shape \(2, 4, 2, 3, 3\).*sum\(num_points\)\) = \(2, 4, 2, 9\)'):
        function(*given[:-1], given[-1].unflatten(3, (3, 3)), num_points=[4, 3, 2])


def test_at_most_16_levels_with_different_numbers_of_points():
    case = make_case(shapes=[(2, 3)] * 17, points=[1] * 16 + [2])
    with pytest.raises(ValueError, match='num_points has 17 levels, but .* at most 16 levels'):
        ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights, num_points=case.num_points)


def test_check_levels():
    check_levels(torch.tensor([[2, 3], [1, 1]]), None, 7)
    with pytest.raises(ValueError, match='add up to 7.*num_keys = 8'):
        check_levels(torch.tensor([[2, 3], [1, 1]]), None, 8)


def test_shapes_from_inference_mode_can_be_trained_with():
    """Shapes given as pairs are cached; the cache must not keep inference tensors."""
    case = make_case(shapes=((9, 4), (2, 3)), dtype=torch.float32)
    with torch.inference_mode():
        ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights)
    case.requires_grad()
    ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights).sum().backward()
    assert case.value.grad.abs().sum() > 0


def test_operator_without_the_checks_keeps_memory_safe():
    """The compiled kernels refuse arguments that would make them read outside of their memory."""
    case = make_case(dtype=torch.float32)
    op = torch.ops.msda.ms_deform_attn
    if not torch._C._dispatch_has_kernel_for_dispatch_key('msda::ms_deform_attn', 'CPU'):
        pytest.skip('libmsda_cpu is not built')
    shapes, starts = torch.tensor(case.shapes), torch.tensor([0, 35, 41])
    good = (case.value, shapes, starts, case.locations, case.weights)
    assert op(*good, False, []).shape == (2, 4, 12)
    for index, bad in (
        (0, case.value[:, :41]),
        (1, shapes * 2),
        (1, shapes * 0),
        (1, shapes.int()),
        (2, starts + 1),
        (3, case.locations[:, :3]),
        (3, case.locations.double()),
        (4, case.weights[..., :2]),
    ):
        with pytest.raises(RuntimeError):
            op(*(bad if i == index else t for i, t in enumerate(good)), False, [])
    flat = (*good[:3], case.locations.flatten(3, 4), case.weights.flatten(3))
    assert op(*flat, False, [4, 3, 2]).shape == (2, 4, 12)
    for bad in ([4, 3, 3], [4, 5], [4, 6, -1], [9, 0, 0], [2**31, 3, 2], []):
        with pytest.raises(RuntimeError):
            op(*flat, False, bad)
    many = make_case(shapes=[(1, 1)] * 17, points=[1] * 16 + [2], dtype=torch.float32)
    with pytest.raises(RuntimeError, match='16'):
        op(many.value, torch.ones(17, 2).long(), torch.arange(17), many.locations, many.weights, False, many.num_points)


def test_floats_are_not_taken_for_the_integers_of_an_earlier_call():
    case = make_case(dtype=torch.float32)
    ms_deform_attn(case.value, case.shapes, None, *case.plain()[1:])
    with pytest.raises(TypeError, match='must be integers'):
        ms_deform_attn(case.value, [(float(h), w) for h, w in case.shapes], None, *case.plain()[1:])

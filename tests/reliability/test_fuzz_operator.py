"""The operator with random arguments: the result matches the float64 definition, or an error explains what is wrong."""

import sys
import warnings
from pathlib import Path

import torch
from fuzzing import fuzz, one_sentence
from hypothesis import strategies as st

from msda_plugin.ops import ms_deform_attn, ms_deform_attn_fused
from msda_plugin.ops.reference import attend, attend_fused

sys.path.insert(0, str(Path(__file__).parents[1] / 'ops'))
from operator_cases import make_case  # noqa: E402

# (relative, absolute), for sums of up to 12 samples of weight 1
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}
FLOATS = tuple(TOLERANCES)
NAMES = ('value', 'spatial_shapes', 'level_start_index', 'coordinates', 'weights', 'reference_points')
OTHERS = (None, 3, 'text', [1.0], torch.zeros(()), torch.zeros(0), torch.zeros(2, 3, dtype=torch.complex64))
LAYOUTS = ('as it is', 'transposed', 'every other', 'expanded')
ODD = (float('nan'), float('inf'), -float('inf'), 1e10, -1e10)

calls = st.fixed_dictionaries(
    dict(
        shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
        batch=st.integers(0, 2),
        queries=st.integers(0, 4),
        heads=st.integers(1, 3),
        head_dim=st.integers(1, 20),
        points=st.integers(1, 4),
        reference_size=st.sampled_from((0, 2, 4)),
        seed=st.integers(0, 99),
        dtype=st.sampled_from(FLOATS),
        coordinate_dtype=st.sampled_from(FLOATS),
        weight_dtype=st.sampled_from(FLOATS),
        layouts=st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4),
        levels=st.sampled_from(('pairs', 'int64', 'int32')),
        starts=st.booleans(),
        gradient=st.booleans(),
        odd=st.lists(st.sampled_from(ODD), max_size=3),
    )
)
mutations = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(('other', 'drop', 'add', 'shorter', 'longer', 'integer', 'meta', 'number')),
        st.integers(0, 5),
    ),
    max_size=2,
)


def lay_out(tensor, layout):
    """The same numbers with another memory layout."""
    if layout == 'transposed' and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == 'every other':
        return torch.stack([tensor, torch.full_like(tensor, float('nan'))], -1)[..., 0]
    if layout == 'expanded' and tensor.shape[0] > 0:
        return tensor[:1].expand(tensor.shape)
    return tensor


def build(call):
    case = make_case(
        call['shapes'],
        call['batch'],
        call['queries'],
        call['heads'],
        call['head_dim'],
        call['points'],
        call['reference_size'] or 2,
        call['seed'],
    )
    fused = call['reference_size'] > 0
    coordinates, weights = (case.offsets, case.logits) if fused else (case.locations, case.weights)
    for index, number in enumerate(call['odd']):
        if coordinates.numel():
            coordinates.view(-1)[7 * index % coordinates.numel()] = number
    given = dict(
        value=case.value.to(call['dtype']),
        spatial_shapes=call['shapes'],
        level_start_index=None,
        coordinates=coordinates.to(call['coordinate_dtype']),
        weights=weights.to(call['weight_dtype']),
    )
    if fused:
        given['reference_points'] = case.reference_points.to(call['coordinate_dtype'])
    if call['levels'] != 'pairs':
        given['spatial_shapes'] = torch.tensor(call['shapes'], dtype=getattr(torch, call['levels']))
    if call['starts']:
        areas = torch.tensor(call['shapes']).prod(1)
        given['level_start_index'] = areas.cumsum(0) - areas
    names = [name for name in given if name not in ('spatial_shapes', 'level_start_index')]
    for name, layout in zip(names, call['layouts'], strict=False):
        given[name] = lay_out(given[name], layout)
    return given


def mutate(given, name, kind, number):
    tensor = given.get(name)
    if kind == 'other' or not isinstance(tensor, torch.Tensor):
        return OTHERS[number % len(OTHERS)]
    axis = number % max(tensor.dim(), 1)
    if kind == 'number':
        odd = (0, -1, 2**40, 7, 2**62, -(2**63))[number]
        return torch.full_like(tensor, odd, dtype=torch.int64) if name in NAMES[1:3] else tensor
    if kind == 'integer':
        return tensor.to((torch.int8, torch.int64, torch.bool, torch.complex64, torch.float32, torch.uint8)[number])
    if kind == 'meta':
        return tensor.to('meta')
    if tensor.dim() == 0:
        return None
    return {
        'drop': lambda: tensor.sum(axis),
        'add': lambda: tensor.unsqueeze(axis),
        'shorter': lambda: tensor.narrow(axis, 0, max(tensor.shape[axis] - 1, 0)),
        'longer': lambda: torch.cat([tensor, tensor.narrow(axis, 0, min(1, tensor.shape[axis]))], axis),
    }[kind]()


def arguments(given):
    rest = [given[name] for name in ('coordinates', 'weights')]
    if 'reference_points' in given:
        return (
            ms_deform_attn_fused,
            attend_fused,
            [given['value'], given['spatial_shapes'], given['level_start_index'], given['reference_points'], *rest],
        )
    return ms_deform_attn, attend, [given['value'], given['spatial_shapes'], given['level_start_index'], *rest]


def check(drawn):
    call, changes = drawn
    given = build(call)
    for name, kind, number in changes:
        if name in given:
            given[name] = mutate(given, name, kind, number)
    function, definition, args = arguments(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the fallback on the device 'meta'
            tensors = [
                t.requires_grad_()
                if isinstance(t, torch.Tensor) and t.is_floating_point() and t.is_leaf and call['gradient']
                else t
                for t in args
            ]
            output = function(*tensors)
    except (TypeError, ValueError) as error:
        assert changes, error
        return one_sentence(error)
    value, shapes, starts, *rest = args
    if value.device.type == 'meta':
        return 'meta'
    shapes = torch.as_tensor(shapes).long()
    areas = shapes.prod(1)
    inputs = [t.detach().double().requires_grad_() for t in (value, *rest)]
    expected = definition(inputs[0], shapes, areas.cumsum(0) - areas, *inputs[1:])
    relative, absolute = TOLERANCES[value.dtype]
    assert output.dtype == value.dtype
    torch.testing.assert_close(output.detach().double(), expected.detach(), rtol=relative, atol=absolute)
    assert output.isfinite().all()
    if output.requires_grad:
        leaves = [t for t in (args[0], *args[3:]) if t.requires_grad]
        grads = torch.autograd.grad(output.sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        if leaves[0] is args[0]:  # the others are discontinuous where a location is on a pixel
            (by_value,) = torch.autograd.grad(expected.sum(), inputs[:1])
            torch.testing.assert_close(grads[0].double(), by_value, rtol=relative, atol=absolute)
        return 'right, with gradients'
    return 'right'


def test_operator(long_run):
    fuzz('operator', st.tuples(calls, st.one_of(st.just([]), mutations)), 4000 if long_run else 100, check)

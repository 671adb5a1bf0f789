"""Equality with mmcv's layer, sampling, precision under autocast, device synchronization and error messages."""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVLayer

from msda_plugin.layers import multi_scale_deformable_attention as module
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.ops import ms_deform_attn
from msda_plugin.registry import MODELS

SHAPES = [(6, 9), (3, 5), (1, 2)]
NUM_KEYS = sum(h * w for h, w in SHAPES)
FIELDS = dict(embed_dims=32, num_heads=4, num_levels=3, num_points=2, dropout=0.0)


def build_pair(**fields):
    """msda_plugin's and mmcv's layer with the same random weights."""
    torch.manual_seed(0)
    ours = MODELS.build(dict(type='msda_plugin.MultiScaleDeformableAttention', **FIELDS | fields))
    theirs = MMCVLayer(**FIELDS | fields)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_inputs(coordinates=2, batch_first=True, masked=False, num_queries=11):
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        tensor = torch.randn(*shape, 32, generator=generator)
        return (tensor if batch_first else tensor.transpose(0, 1)).contiguous().requires_grad_()

    shapes = torch.tensor(SHAPES)
    mask = torch.zeros(2, NUM_KEYS, dtype=torch.bool)
    mask[1, 20:] = True
    return dict(
        query=leaf(2, num_queries),
        value=leaf(2, NUM_KEYS),
        query_pos=leaf(2, num_queries),
        identity=leaf(2, num_queries),
        key_padding_mask=mask if masked else None,
        reference_points=torch.rand(2, num_queries, 3, coordinates, generator=generator).requires_grad_(),
        spatial_shapes=shapes,
        level_start_index=shapes.prod(1).cumsum(0) - shapes.prod(1),
    )


def run(layer, inputs):
    """The output, and the gradients of a weighted sum of it by name."""
    leaves = {name: tensor for name, tensor in inputs.items() if getattr(tensor, 'requires_grad', False)}
    leaves |= dict(layer.named_parameters())
    output = layer(**inputs)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    return output, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('coordinates', [2, 4])
def test_equals_mmcv(coordinates, batch_first, masked):
    ours, theirs = build_pair(batch_first=batch_first)
    inputs = make_inputs(coordinates, batch_first, masked)
    output, gradients = run(ours, inputs)
    expected, expected_gradients = run(theirs, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f'{name}: {m}'
        )


def test_value_and_identity_default_to_the_query():
    ours, theirs = build_pair(batch_first=True)
    inputs = make_inputs(num_queries=NUM_KEYS)
    for name in ('value', 'identity'):
        del inputs[name]
    torch.testing.assert_close(ours(**inputs), theirs(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('coordinates', [2, 4])
@pytest.mark.parametrize('kind', ['ours', 'mmcv'])
def test_sampling_reproduces_the_output(kind, coordinates, batch_first):
    layer = build_pair(batch_first=batch_first)[kind == 'mmcv']
    inputs = make_inputs(coordinates, batch_first, masked=True)
    locations, weights, reference_points, shapes = MultiScaleDeformableAttention.sampling(layer, **inputs)
    assert locations.shape == (2, 11, 4, 3, 2, 2) and weights.shape == (2, 11, 4, 3, 2)
    assert reference_points is inputs['reference_points'] and shapes is inputs['spatial_shapes']
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 11, 4))
    value = inputs['value'] if batch_first else inputs['value'].transpose(0, 1)
    value = layer.value_proj(value).masked_fill(inputs['key_padding_mask'][..., None], 0).unflatten(-1, (4, -1))
    attended = layer.output_proj(ms_deform_attn(value, shapes, inputs['level_start_index'], locations, weights))
    expected = (attended if batch_first else attended.transpose(0, 1)) + inputs['identity']
    torch.testing.assert_close(layer(**inputs), expected, rtol=1e-5, atol=1e-5)


def test_sampling_keeps_locations_in_float32_under_autocast():
    layer, _ = build_pair(batch_first=True)
    with torch.autocast('cpu', torch.bfloat16):
        locations, weights, *_ = layer.sampling(**make_inputs())
    assert locations.dtype == weights.dtype == torch.float32


def test_forward_computes_no_locations(monkeypatch):
    ours, _ = build_pair(batch_first=True)
    monkeypatch.setattr(module, 'sampling_locations', lambda *_: pytest.fail('forward computed sampling locations'))
    ours(**make_inputs())


def test_wider_values():
    ours, theirs = build_pair(batch_first=True, value_proj_ratio=2.0)
    inputs = make_inputs()
    torch.testing.assert_close(ours(**inputs), theirs(**inputs), rtol=1e-5, atol=1e-5)


def test_shapes_as_pairs_without_starts_and_a_byte_mask():
    ours, _ = build_pair(batch_first=True)
    inputs = make_inputs(masked=True)
    expected = ours(**inputs)
    inputs.update(spatial_shapes=SHAPES, level_start_index=None, key_padding_mask=inputs['key_padding_mask'].byte())
    assert torch.equal(ours(**inputs), expected)


def test_has_the_weights_and_initialization_of_mmcv():
    torch.manual_seed(3)
    ours = MultiScaleDeformableAttention(**FIELDS)
    torch.manual_seed(3)
    theirs = MMCVLayer(**FIELDS)
    assert isinstance(ours, MMCVLayer)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize('coordinates', [2, 4])
def test_autocast_error_is_at_most_twice_that_of_mmcv(coordinates):
    ours, theirs = build_pair(batch_first=True)
    inputs = make_inputs(coordinates, masked=True)
    exact, exact_gradients = run(theirs, inputs)
    with torch.autocast('cpu', torch.bfloat16):
        output, gradients = run(ours, inputs)
        reference, reference_gradients = run(theirs, inputs)
    assert output.dtype == torch.float32
    assert (output - exact).abs().mean() <= 2 * (reference - exact).abs().mean()
    for name, gradient in exact_gradients.items():
        error, reference_error = gradients[name] - gradient, reference_gradients[name] - gradient
        assert error.abs().mean() <= 2 * reference_error.abs().mean(), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_value_once_and_no_location(dtype, monkeypatch):
    ours, _ = build_pair(batch_first=True)
    inputs = make_inputs(masked=True)
    seen = {}

    def record(value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits):
        seen.update(value=value, reference_points=reference_points)
        return value[:, : sampling_offsets.shape[1]].flatten(2)

    monkeypatch.setattr(module, 'ms_deform_attn_fused', record)
    with torch.autocast('cpu', dtype):
        ours(**inputs)
        projected = ours.value_proj(inputs['value'])
    expected = projected.masked_fill(inputs['key_padding_mask'][..., None], 0)
    assert seen['value'].dtype == dtype and torch.equal(seen['value'].flatten(2), expected)
    assert seen['reference_points'] is inputs['reference_points']


def test_no_device_synchronization(monkeypatch):
    """Reading a value of a meta tensor raises."""
    ours, _ = build_pair(batch_first=True)
    inputs = {name: tensor.to('meta') for name, tensor in make_inputs(masked=True).items()}
    monkeypatch.setattr(
        module, 'ms_deform_attn_fused', lambda value, *others: value[:, : inputs['query'].shape[1]].flatten(2)
    )
    assert ours.to('meta')(**inputs).shape == (2, 11, 32)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(reference_points=None), 'reference_points is None'),
        (dict(spatial_shapes=None), 'spatial_shapes is None'),
        (dict(spatial_shapes=SHAPES[:2]), 'has 2 levels, but the layer was built with num_levels=3'),
        (dict(spatial_shapes=[(6, 9), (3, 5), (2, 2)], level_start_index=None), 'num_keys = 71'),
        (dict(query=torch.zeros(2, 11, 16), query_pos=None), r'\(bs, num_queries, 32\)'),
        (dict(value=torch.zeros(NUM_KEYS, 2, 32)), 'batch_first=True'),
        (dict(reference_points=torch.zeros(11, 2, 3, 2)), r'bs, num_queries = \(2, 11\)'),
        (dict(reference_points=torch.zeros(2, 11, 3, 3)), '2 or 4'),
        (dict(key_padding_mask=torch.zeros(NUM_KEYS, 2)), r'\(bs, num_keys\) = \(2, 71\)'),
    ],
)
def test_bad_inputs_raise(changes, message):
    ours, _ = build_pair(batch_first=True)
    with pytest.raises(ValueError, match=message):
        ours(**make_inputs() | changes)

"""Points per level and discrete sampling (RT-DETRv2)."""

import pytest
import torch

from msda_plugin.layers import MultiScaleDeformableAttention, PointsPerLevelAttention
from msda_plugin.ops import ms_deform_attn

SHAPES = [(6, 9), (3, 5), (2, 3)]
FIELDS = dict(embed_dims=16, num_heads=2, num_levels=3, dropout=0.0, batch_first=True)


def inputs(seed=0):
    torch.manual_seed(seed)
    return dict(
        query=torch.randn(2, 7, 16).double(),
        value=torch.randn(2, sum(h * w for h, w in SHAPES), 16).double(),
        reference_points=torch.rand(2, 7, 3, 4).double(),
        spatial_shapes=SHAPES,
    )


def randomize(layer):
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def test_equal_points_are_the_parent_layer():
    layer, parent = (
        PointsPerLevelAttention(**FIELDS, num_points=4),
        MultiScaleDeformableAttention(**FIELDS, num_points=4),
    )
    assert torch.equal(layer.sampling_offsets.bias, parent.sampling_offsets.bias)
    randomize(layer)
    parent.double().load_state_dict(layer.state_dict())
    assert torch.allclose(layer(**inputs()), parent(**inputs()), rtol=1e-12)
    locations = [module.sampling(**inputs()).locations for module in (layer, parent)]
    assert torch.allclose(*locations, rtol=1e-12)


@pytest.mark.parametrize('method', ['default', 'discrete'])
def test_output_follows_from_the_sampling_points(method):
    layer = randomize(PointsPerLevelAttention(**FIELDS, num_points=[3, 1, 2], method=method))
    batch = inputs()
    sampling = layer.sampling(**batch)
    assert sampling.locations.shape == (2, 7, 2, 3, 3, 2)
    weights = sampling.weights
    assert torch.allclose(weights.sum((-1, -2)), torch.ones(()).double())
    assert not weights[..., 1, 1:].any() and not weights[..., 2, 2:].any()
    value = layer.value_proj(batch['value']).unflatten(-1, (2, -1))
    expected = layer.output_proj(ms_deform_attn(value, SHAPES, None, sampling.locations, weights)) + batch['query']
    assert torch.allclose(layer(**batch), expected, rtol=1e-6)
    if method == 'discrete':
        pixels = sampling.locations * torch.tensor(SHAPES).flip(-1)[:, None] - 0.5
        assert torch.allclose(pixels, pixels.round(), atol=1e-9)


def test_gradients():
    layer = randomize(PointsPerLevelAttention(**FIELDS, num_points=[2, 1, 3]))
    batch = inputs() | dict(key_padding_mask=torch.arange(75).expand(2, -1) % 5 == 0)
    leaves = [batch[name].requires_grad_() for name in ('query', 'value')]
    torch.autograd.gradcheck(
        lambda query, value: layer(**batch | dict(query=query, value=value)), leaves, fast_mode=True
    )


def test_discrete_offsets_are_not_trained():
    layer = randomize(PointsPerLevelAttention(**FIELDS, num_points=2, method='discrete'))
    layer(**inputs()).sum().backward()
    assert {name.split('.')[0] for name, p in layer.named_parameters() if p.grad is None} == {'sampling_offsets'}
    assert layer.attention_weights.weight.grad.any()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(num_points=[2, 2]), r'num_points=\[2, 2\]; expected at least 1 for each of the num_levels=3 levels'),
        (dict(num_points=[2, 0, 1]), 'expected at least 1'),
        (dict(method='nearest'), r"method is 'nearest'; expected one of \('default', 'discrete'\)"),
    ],
)
def test_bad_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        PointsPerLevelAttention(**FIELDS | fields)


def test_points_are_refused():
    batch = inputs()
    batch['reference_points'] = batch['reference_points'][..., :2]
    with pytest.raises(ValueError, match='takes boxes, .* use MultiScaleDeformableAttention for points'):
        PointsPerLevelAttention(**FIELDS).double()(**batch)

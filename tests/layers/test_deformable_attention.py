"""Single-scale deformable attention equals the multi-scale layer with one level, on tokens and on feature maps."""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVLayer

from msda_plugin.layers import DeformableAttention, DeformableDetrTransformerEncoder, MultiScaleDeformableAttention
from msda_plugin.ops import ms_deform_attn
from msda_plugin.registry import MODELS

FIELDS = dict(embed_dims=32, num_heads=4, num_points=3, dropout=0.0)
SHAPE = (5, 7)


def build_pair(theirs=MultiScaleDeformableAttention):
    """The layer and a multi-scale layer with one level, with the same random weights, in float64."""
    torch.manual_seed(0)
    ours = MODELS.build(dict(type='msda_plugin.DeformableAttention', **FIELDS)).double()
    theirs = theirs(num_levels=1, batch_first=True, **FIELDS).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_map(shape=SHAPE, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 32, *shape, dtype=torch.float64, generator=generator).requires_grad_()


def tokens_of(fmap):
    return fmap.flatten(2).transpose(1, 2)


def make_inputs(coordinates=2, num_queries=11):
    """Keywords of both layers."""
    generator = torch.Generator().manual_seed(2)
    query, query_pos, identity = (
        torch.randn(2, num_queries, 32, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    )
    mask = torch.zeros(2, SHAPE[0] * SHAPE[1], dtype=torch.bool)
    mask[1, 20:] = True
    points = torch.rand(2, num_queries, 1, coordinates, dtype=torch.float64, generator=generator).requires_grad_()
    return dict(
        query=query,
        value=tokens_of(make_map()),
        query_pos=query_pos,
        identity=identity,
        key_padding_mask=mask,
        reference_points=points,
        spatial_shapes=torch.tensor([SHAPE]),
        level_start_index=torch.tensor([0]),
    )


def gradients(out, leaves):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), leaves)


def centers(height, width):
    """Pixel centers (1, height * width, 1, 2), float64."""
    return torch.tensor(
        [[[[(x + 0.5) / width, (y + 0.5) / height]] for y in range(height) for x in range(width)]], dtype=torch.float64
    )


@pytest.mark.parametrize('coordinates', [2, 4])
def test_equals_the_multi_scale_layer_exactly(coordinates):
    ours, theirs = build_pair()
    inputs = make_inputs(coordinates)
    out, expected = ours(**inputs), theirs(**inputs)
    assert torch.equal(out, expected)
    leaves = [inputs[name] for name in ('query', 'query_pos', 'identity', 'reference_points')]
    for layer_out, layer in ((out, ours), (expected, theirs)):
        layer.gradients = gradients(layer_out, [*leaves, *layer.parameters()])
    assert all(torch.equal(*pair) for pair in zip(ours.gradients, theirs.gradients, strict=True))


@pytest.mark.parametrize('coordinates', [2, 4])
def test_equals_mmcv_in_float64(coordinates):
    ours, theirs = build_pair(MMCVLayer)
    inputs = make_inputs(coordinates)
    torch.testing.assert_close(ours(**inputs), theirs(**inputs), rtol=0, atol=1e-12)


def test_has_the_weights_and_initialization_of_mmcv():
    layers = []
    for kind, fields in ((DeformableAttention, {}), (MMCVLayer, dict(num_levels=1))):
        torch.manual_seed(3)
        layers.append(kind(**FIELDS, **fields))
    ours, theirs = (layer.state_dict() for layer in layers)
    assert isinstance(layers[0], MMCVLayer) and list(ours) == list(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize('shapes', [SHAPE, list(SHAPE), [SHAPE], torch.tensor([SHAPE])], ids=str)
def test_accepted_forms_of_spatial_shapes(shapes):
    ours, _ = build_pair()
    inputs = make_inputs()
    expected = ours(**inputs)
    inputs.update(spatial_shapes=shapes, level_start_index=None, reference_points=inputs['reference_points'][:, :, 0])
    assert torch.equal(ours(**inputs), expected)


def test_value_as_a_map():
    ours, theirs = build_pair()
    inputs = make_inputs()
    fmap = make_map()
    mask = inputs['key_padding_mask'].view(2, *SHAPE)
    out = ours(**inputs | dict(value=fmap, key_padding_mask=mask, spatial_shapes=None))
    assert torch.equal(out, theirs(**inputs))
    assert gradients(out, [fmap])[0].abs().sum() > 0


@pytest.mark.parametrize('given', [False, True])
def test_sampling_reproduces_the_output(given):
    layer, _ = build_pair()
    fmap, position = make_map(), make_map(seed=5)
    inputs = dict(query=fmap, query_pos=position)
    if given:
        inputs['reference_points'] = torch.rand(2, 35, 4, dtype=torch.float64)
    locations, weights, reference_points, shapes = layer.sampling(**inputs)
    assert reference_points.shape == (2, 35, 1, 4 if given else 2) and shapes == [SHAPE]
    value = layer.value_proj(tokens_of(fmap)).unflatten(-1, (4, -1))
    attended = layer.output_proj(ms_deform_attn(value, shapes, None, locations, weights))
    torch.testing.assert_close(tokens_of(layer(**inputs)), attended + tokens_of(fmap), rtol=0, atol=1e-10)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('shape', [SHAPE, (1, 6), (1, 1)], ids=str)
def test_self_attention_of_a_map(shape, batch):
    ours, theirs = build_pair()
    fmap, position = make_map(shape, batch), make_map(shape, batch, seed=5)
    out = ours(fmap, query_pos=position)
    expected = theirs(
        tokens_of(fmap),
        query_pos=tokens_of(position),
        spatial_shapes=[shape],
        reference_points=centers(*shape).expand(batch, -1, -1, -1),
    )
    assert out.shape == fmap.shape
    # Pixel centers are computed in float32.
    torch.testing.assert_close(tokens_of(out), expected, rtol=0, atol=1e-5)
    as_tokens = ours(tokens_of(fmap), query_pos=tokens_of(position), spatial_shapes=shape)
    torch.testing.assert_close(as_tokens, tokens_of(out), rtol=0, atol=1e-12)
    channels_last = fmap.detach().contiguous(memory_format=torch.channels_last)
    strided = torch.stack([fmap.detach()] * 2, -1)[..., 0]
    for other in (channels_last, strided):
        torch.testing.assert_close(ours(other, query_pos=position), out, rtol=0, atol=1e-12)


def test_encoder_config_with_one_level():
    torch.manual_seed(0)
    fields = dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(type='msda_plugin.DeformableAttention', **FIELDS),
            ffn_cfg=dict(embed_dims=32, feedforward_channels=64),
        ),
    )
    ours = MODELS.build(dict(type='msda_plugin.DeformableDetrTransformerEncoder', **fields))
    fields['layer_cfg']['self_attn_cfg'] = dict(num_levels=1, **FIELDS)
    theirs = DeformableDetrTransformerEncoder(**fields)
    theirs.load_state_dict(ours.state_dict())
    tokens, position = (tokens_of(make_map(seed=seed)).float() for seed in (1, 2))
    inputs = dict(
        query=tokens,
        query_pos=position,
        key_padding_mask=None,
        spatial_shapes=(SHAPE,),
        level_start_index=torch.tensor([0]),
        valid_ratios=torch.tensor([[[1.0, 1.0]], [[0.7, 0.9]]]),
    )
    assert torch.equal(ours(**inputs), theirs(**inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    ours = build_pair()[0].float()
    fmap = make_map().detach().float().requires_grad_()
    exact = ours(fmap)
    with torch.autocast('cpu', dtype):
        out = ours(fmap)
    assert all(gradient.isfinite().all() for gradient in gradients(out, [fmap, *ours.parameters()]))
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.1)


def test_batch_first_must_be_true():
    with pytest.raises(ValueError, match='batch_first=False, but DeformableAttention takes tokens'):
        DeformableAttention(**FIELDS, batch_first=False)


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(spatial_shapes=None), r'value has shape \(2, 35, 32\) and spatial_shapes is None; expected a map'),
        (dict(spatial_shapes=[(5, 7), (3, 4)]), 'has 2 levels, but the layer was built with num_levels=1'),
        (dict(spatial_shapes=(5, 6)), 'num_keys = 35'),
        (dict(reference_points=None), 'reference_points is None, but there are 11 queries for the 35 pixels'),
        (dict(key_padding_mask=torch.zeros(2, 36)), r'\(bs, num_keys\) = \(2, 35\)'),
    ],
)
def test_bad_inputs_raise(changes, message):
    ours, _ = build_pair()
    with pytest.raises(ValueError, match=message):
        ours(**make_inputs() | changes)

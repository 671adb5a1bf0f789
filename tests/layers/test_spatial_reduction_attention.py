"""Spatial-reduction attention equals MMDetection's, works at any map size, and has the linear form."""

import pytest
import torch
from mmdet.models.backbones.pvt import PVTEncoderLayer
from mmdet.models.backbones.pvt import SpatialReductionAttention as MMDetSpatialReductionAttention
from torch.nn import functional as F

from msda_plugin.layers import SpatialReductionAttention
from msda_plugin.registry import MODELS


def build(**fields):
    """A layer with random weights, in float64."""
    torch.manual_seed(0)
    layer = MODELS.build(dict(type='msda_plugin.SpatialReductionAttention', embed_dims=16, num_heads=4) | fields)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def build_pair(**fields):
    ours = build(**fields)
    theirs = MMDetSpatialReductionAttention(**dict(embed_dims=16, num_heads=4) | fields).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def make_tokens(hw_shape, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, hw_shape[0] * hw_shape[1], 16, dtype=dtype, generator=generator).requires_grad_()


def run(layer, x, *args, **kwargs):
    """The output, and the gradients of a weighted sum of it."""
    out = layer(x, *args, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])


def plain_attention(layer, query, key):
    """softmax(q k^T / sqrt(d)) v, head by head, with the scores stored: (B, N, C), (B, M, C) -> (B, N, C)."""
    weights, biases = layer.attn.in_proj_weight.chunk(3), layer.attn.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(x, weight, bias).split(query.shape[-1] // layer.num_heads, -1)
        for x, weight, bias in zip((query, key, key), weights, biases, strict=True)
    )
    outs = [(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(query, key, value, strict=True)]
    return F.linear(torch.cat(outs, -1), layer.attn.out_proj.weight, layer.attn.out_proj.bias)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(
    'sr_ratio, hw_shape', [(8, (16, 24)), (8, (19, 9)), (4, (4, 7)), (2, (5, 5)), (1, (3, 5)), (1, (1, 1))], ids=str
)
def test_equals_mmdetection(sr_ratio, hw_shape, batch):
    ours, theirs = build_pair(sr_ratio=sr_ratio)
    x = make_tokens(hw_shape, batch)
    torch.testing.assert_close(run(ours, x, hw_shape), run(theirs, x, hw_shape), rtol=0, atol=1e-10)


def test_equals_mmdetection_with_other_options():
    ours, theirs = build_pair(sr_ratio=2, qkv_bias=False, norm_cfg=dict(type='LN', eps=1e-3))
    x, identity = make_tokens((4, 6)), torch.randn(2, 24, 16, dtype=torch.float64)
    torch.testing.assert_close(run(ours, x, (4, 6), identity), run(theirs, x, (4, 6), identity), rtol=0, atol=1e-10)


def test_replaces_mmdetections_layer_in_pvt():
    torch.manual_seed(0)
    block = PVTEncoderLayer(16, 4, feedforward_channels=32, sr_ratio=2, use_conv_ffn=True).double().eval()
    x = make_tokens((7, 9))
    expected = block(x, (7, 9))
    ours = build(sr_ratio=2, dropout_layer=dict(type='DropPath', drop_prob=0.1)).eval()
    ours.load_state_dict(block.attn.state_dict())
    block.attn = ours
    torch.testing.assert_close(block(x, (7, 9)), expected, rtol=0, atol=1e-12)


def test_starts_from_mmdetections_weights():
    layers = []
    for kind in (SpatialReductionAttention, MMDetSpatialReductionAttention):
        torch.manual_seed(3)
        layers.append(kind(16, 4, sr_ratio=2).state_dict())
    assert list(layers[0]) == list(layers[1])
    assert all(torch.equal(layers[0][name], value) for name, value in layers[1].items())


@pytest.mark.parametrize('hw_shape, padded', [((3, 5), (4, 5)), ((2, 9), (4, 9)), ((1, 1), (4, 4))], ids=str)
def test_a_side_shorter_than_the_reduction_is_padded_with_zeros(hw_shape, padded):
    layer = build(sr_ratio=4)
    x = make_tokens(hw_shape)
    fmap = x.new_zeros(2, 16, *padded)
    fmap[:, :, : hw_shape[0], : hw_shape[1]] = x.mT.reshape(2, 16, *hw_shape)
    reduced = layer.norm(layer.sr(fmap).flatten(2).mT)
    assert reduced.shape[1] == (padded[0] // 4) * (padded[1] // 4)
    torch.testing.assert_close(layer(x, hw_shape), x + plain_attention(layer, x, reduced), rtol=0, atol=1e-12)


@pytest.mark.parametrize('hw_shape', [(14, 21), (9, 16), (3, 2), (1, 1)], ids=str)
def test_linear_form(hw_shape):
    """Pooling to 7 x 7, 1 x 1 convolution, norm and GELU, for any sr_ratio."""
    layer = build(linear=True, sr_ratio=8)
    x = make_tokens(hw_shape)
    pooled = F.adaptive_avg_pool2d(x.mT.reshape(2, 16, *hw_shape), 7).flatten(2).mT
    reduced = F.gelu(layer.norm(F.linear(pooled, layer.sr.weight.flatten(1), layer.sr.bias)))
    expected = x + plain_attention(layer, x, reduced)
    torch.testing.assert_close(layer(x, hw_shape), expected, rtol=0, atol=1e-12)
    _, gradients = run(layer, x, hw_shape)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_attends_to_another_map():
    layer = build(sr_ratio=2, add_identity=False)
    x, key = make_tokens((6, 7)), make_tokens((4, 3))
    reduced = layer.norm(layer.sr(key.mT.reshape(2, 16, 4, 3)).flatten(2).mT)
    out = layer(x, (6, 7), key=key, key_hw_shape=(4, 3))
    torch.testing.assert_close(out, plain_attention(layer, x, reduced), rtol=0, atol=1e-12)


def test_scores_are_not_stored():
    """The 1024 x 1024 scores of one head are 4 MiB."""
    layer = build(num_heads=1).float()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        layer(make_tokens((32, 32), batch=1, dtype=torch.float32), (32, 32))
    assert max(saved) == 1024 * 16


def test_non_contiguous_tokens():
    layer = build(sr_ratio=2)
    x = make_tokens((9, 11)).detach()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(layer(strided, (9, 11)), layer(x, (9, 11)), rtol=0, atol=1e-12)


@pytest.mark.parametrize('fields', [dict(attn_drop=0.5), dict(proj_drop=0.5)], ids=str)
def test_dropout_acts_in_training_only(fields):
    layer = build(sr_ratio=2, **fields)
    x = make_tokens((8, 8))
    assert torch.equal(layer.eval()(x, (8, 8)), layer(x, (8, 8)))
    assert not torch.equal(layer.train()(x, (8, 8)), layer(x, (8, 8)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('fields', [dict(sr_ratio=4), dict(linear=True)], ids=str)
def test_autocast(fields, dtype):
    layer = build(add_identity=False, **fields).float()
    x = make_tokens((10, 13), dtype=torch.float32)
    exact = layer(x, (10, 13))
    with torch.autocast('cpu', dtype):
        out, gradients = run(layer, x, (10, 13))
    assert out.dtype == dtype and all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(embed_dims=30, num_heads=4), 'embed_dims=30 is not a multiple of num_heads=4'),
        (dict(embed_dims=32, num_heads=4, sr_ratio=0), 'sr_ratio=0 does not fit'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialReductionAttention(**options)


def test_bad_input():
    layer = SpatialReductionAttention(16, 4)
    x = torch.rand(1, 64, 16)
    with pytest.raises(ValueError, match=r'\(1, 64, 16\) for a 8x7 map; expected \(B, 56, 16\)'):
        layer(x, (8, 7))
    with pytest.raises(ValueError, match=r'\(1, 64, 16\) for a 4x4 map'):
        layer(x, (8, 8), key=x, key_hw_shape=(4, 4))
    with pytest.raises(ValueError, match='key_hw_shape is None, but key is a tensor: give both'):
        layer(x, (8, 8), key=x)

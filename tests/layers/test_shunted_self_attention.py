"""Shunted self-attention against the published formula, with the scores stored."""

import pytest
import torch
from torch.nn import functional as F

from msda_plugin.layers.shunted_self_attention import ShuntedSelfAttention


def plain_attention(layer, x, hw_shape):
    """softmax(q k^T / sqrt(d)) v, head by head, on maps in (B, C, H, W)."""
    batch, _, dims = x.shape
    head_dim = dims // layer.num_heads
    queries = layer.query(x).split(head_dim, dim=-1)

    def attend(key, value, heads, first):
        outs = []
        for i in range(heads):
            part = slice(i * head_dim, (i + 1) * head_dim)
            scores = queries[first + i] @ key[..., part].transpose(1, 2) / head_dim**0.5
            outs.append(scores.softmax(-1) @ value[..., part])
        return outs

    def depthwise(conv, value, shape):
        fmap = value.transpose(1, 2).reshape(batch, -1, *shape)
        return F.conv2d(fmap, conv.weight, conv.bias, padding=1, groups=fmap.shape[1]).flatten(2).transpose(1, 2)

    if layer.sr_ratio == 1:
        key, value = layer.kv(x).split(dims, dim=-1)
        out = torch.cat(attend(key, value, layer.num_heads, 0), -1)
        return layer.proj(out + depthwise(layer.local_enhancement, value, hw_shape))
    outs = []
    for i, branch in enumerate(layer.branches):
        rate = layer.sr_ratio // (i + 1)
        fmap = x.transpose(1, 2).reshape(batch, dims, *hw_shape)
        reduced = F.conv2d(fmap, branch.reduction.weight, branch.reduction.bias, stride=rate)
        shape = (hw_shape[0] // rate, hw_shape[1] // rate)
        assert reduced.shape[2:] == shape
        tokens = F.gelu(branch.norm(reduced.flatten(2).transpose(1, 2)))
        key, value = branch.kv(tokens).split(dims // 2, dim=-1)
        value = value + depthwise(branch.local_enhancement, value, shape)
        outs += attend(key, value, layer.num_heads // 2, i * layer.num_heads // 2)
    return layer.proj(torch.cat(outs, -1))


@pytest.mark.parametrize('sr_ratio, num_heads', [(8, 2), (4, 4), (2, 4), (1, 4), (1, 1)])
@pytest.mark.parametrize('hw_shape', [(16, 24), (11, 9)])
def test_matches_plain_attention_in_float64(sr_ratio, num_heads, hw_shape):
    torch.manual_seed(0)
    layer = ShuntedSelfAttention(32, num_heads, sr_ratio).double()
    x = torch.randn(2, hw_shape[0] * hw_shape[1], 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    out, expected = layer(x, hw_shape), plain_attention(layer, x, hw_shape)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    inputs = [x, *layer.parameters()]
    for grad, reference in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-10)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer = ShuntedSelfAttention(32, 2, 2, attn_drop_rate=0.5, proj_drop_rate=0.5)
    x = torch.randn(1, 64, 32)
    assert torch.equal(layer.eval()(x, (8, 8)), layer(x, (8, 8)))
    assert not torch.equal(layer.train()(x, (8, 8)), layer(x, (8, 8)))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(embed_dims=30, num_heads=4), 'embed_dims=30 is not a multiple of num_heads=4'),
        (dict(embed_dims=32, num_heads=1, sr_ratio=2), 'num_heads=1 is odd'),
        (dict(embed_dims=32, num_heads=2, sr_ratio=3), 'sr_ratio=3 does not fit'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ShuntedSelfAttention(**options)


def test_bad_input():
    layer = ShuntedSelfAttention(32, 2, 4)
    with pytest.raises(ValueError, match='needs at least 4 rows and columns'):
        layer(torch.rand(1, 24, 32), (3, 8))
    with pytest.raises(ValueError, match='expected \\(B, 64, 32\\)'):
        layer(torch.rand(1, 63, 32), (8, 8))

"""The detail-specific feed-forward layer against its formula, in one slice of hidden channels and in several."""

import pytest
import torch
from torch.nn import functional as F

from msda_plugin.layers import detail_feed_forward
from msda_plugin.layers.detail_feed_forward import DetailFeedForward


def plain(layer, x, hw_shape):
    h = F.linear(x, layer.fc1.weight, layer.fc1.bias)
    fmap = h.transpose(1, 2).reshape(x.shape[0], -1, *hw_shape)
    h = h + F.conv2d(fmap, layer.dwconv.weight, layer.dwconv.bias, padding=1, groups=fmap.shape[1]).flatten(2).mT
    return F.linear(F.gelu(h), layer.fc2.weight, layer.fc2.bias)


@pytest.mark.parametrize('slice_bytes', [2**24, 2 * 35 * 8 * 64, 1])
def test_matches_the_formula(monkeypatch, slice_bytes):
    """160 hidden channels in one slice, in slices of 64, 64, 32 and in slices of 32."""
    monkeypatch.setattr(detail_feed_forward, 'SLICE_BYTES', slice_bytes)
    torch.manual_seed(0)
    layer = DetailFeedForward(40, 160).double()
    x = torch.randn(2, 35, 40, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn_like(x)
    out, expected = layer(x, (5, 7)), plain(layer, x, (5, 7))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    inputs = [x, *layer.parameters()]
    for grad, reference in zip(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out), strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-12)


def test_slices_cover_every_channel_once(monkeypatch):
    tokens, weight = torch.empty(100, 8), torch.empty(200, 8)
    for slice_bytes in (1, 100 * 4 * 90, 2**24):
        monkeypatch.setattr(detail_feed_forward, 'SLICE_BYTES', slice_bytes)
        channels = [c for part in detail_feed_forward._slices(tokens, weight) for c in range(200)[part]]
        assert channels == list(range(200))


def test_dropout_and_low_precision_are_not_sliced():
    torch.manual_seed(0)
    layer = DetailFeedForward(32, 64, drop_rate=0.5)
    x = torch.randn(1, 16, 32)
    expected = plain(layer, x, (4, 4))
    torch.testing.assert_close(layer.eval()(x, (4, 4)), expected)
    dropped = layer.train()(x, (4, 4))
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    with torch.autocast('cpu', torch.bfloat16):
        half = layer.eval()(x, (4, 4))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)

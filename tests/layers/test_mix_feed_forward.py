"""The feed-forward layer equals PVT's, with and without the convolution."""

import pytest
import torch
from mmdet.models.backbones.pvt import MixFFN
from torch import nn

from msda_plugin.layers.mix_feed_forward import MixFeedForward


@pytest.mark.parametrize('hw_shape', [(5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize('use_conv', [True, False])
def test_equals_mmdetection(use_conv, hw_shape):
    torch.manual_seed(0)
    ours, theirs = MixFeedForward(16, 24, use_conv).double(), MixFFN(16, 24, use_conv=use_conv).double()
    with torch.no_grad():
        convs = [layer for layer in theirs.layers if isinstance(layer, nn.Conv2d)]
        for layer, other in zip(ours.children(), convs, strict=True):
            layer.weight.copy_(other.weight.view_as(layer.weight))
            layer.bias.copy_(other.bias)
    x = torch.randn(2, hw_shape[0] * hw_shape[1], 16, dtype=torch.float64, requires_grad=True)
    out, expected = ours(x, hw_shape), theirs(x, hw_shape, identity=0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (out, expected)), rtol=0, atol=1e-10)

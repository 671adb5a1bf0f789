"""LayerNorm2d equals nn.LayerNorm over the channels."""

import torch
from torch import nn

from msda_plugin.layers.layer_norm_2d import LayerNorm2d


def test_equals_layer_norm_over_the_channels():
    layer, expected = LayerNorm2d(6, eps=1e-3), nn.LayerNorm(6, eps=1e-3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    expected.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(layer(x), expected(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_default_eps():
    assert LayerNorm2d(6).eps == 1e-6

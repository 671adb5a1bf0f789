"""The faster dropout: probabilities, gradients, and the layers it is used in."""

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from torch import nn

import msda_plugin
from msda_plugin.acceleration.fast_dropout import FastDropout
from msda_plugin.acceleration.mmcv_models import change_other_layers


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9, 1e-6])
def test_probability_scale_and_gradient(p):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Dropout(p))
    assert msda_plugin.accelerate(layer, fast_dropout=True) == 0
    assert isinstance(layer[0], FastDropout) and type(layer[0]).__name__ == 'Dropout'
    x = torch.randn(301, 333).requires_grad_()
    output = layer(x)
    output.backward(torch.ones_like(output))
    kept = output != 0
    count, expected = (~kept).sum().item(), x.numel() * p
    assert abs(count - expected) < 5 * (expected * (1 - p)) ** 0.5 + 10
    factor = 1 / (1 - p)
    torch.testing.assert_close(output, x.detach() * kept * factor, rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad, kept * torch.tensor(factor), rtol=1e-4, atol=0)
    assert kept[0].ne(kept[1]).any() or p < 0.01  # rows are independent


def test_elements_are_independent():
    torch.manual_seed(0)
    dropped = (FastDropout(0.5)(torch.ones(4096, 64)) == 0).float()
    correlations = torch.corrcoef(dropped.T).fill_diagonal_(0)
    assert correlations.abs().max() < 0.08


def test_same_seed_same_numbers_and_evaluation():
    layer = FastDropout(0.3)
    x = torch.rand(7, 9)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    assert layer.eval()(x) is x


@pytest.mark.parametrize('p', [0.25, 0.0, 1.0])
def test_feed_forward_network(p):
    torch.manual_seed(0)
    ffn = FFN(embed_dims=8, feedforward_channels=64, ffn_drop=p, add_identity=False)
    change_other_layers(nn.Sequential(ffn))
    msda_plugin.accelerate(ffn, fast_dropout=True)
    x = torch.rand(200, 8, requires_grad=True)
    hidden = ffn.layers[0](x)
    expected = ffn.layers[0][0](x).relu()
    zeros = hidden == 0
    assert abs((zeros & (expected > 0)).sum() / (expected > 0).sum() - p) < 0.02
    if p < 1:
        torch.testing.assert_close(hidden[~zeros], expected[~zeros] / (1 - p), rtol=1e-4, atol=1e-6)
        gradient, reference = (torch.autograd.grad(t[~zeros].sum(), x)[0] for t in (hidden, expected / (1 - p)))
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert ffn(x).shape == x.shape
    msda_plugin.restore(ffn)
    assert not any(isinstance(module, FastDropout) for module in ffn.modules())

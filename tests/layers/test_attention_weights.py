"""attention_weights returns the weights that scaled_dot_product_attention applies."""

import pytest
import torch
from torch.nn import functional as F

from msda_plugin.layers import DeformableMultiHeadAttention, ShuntedSelfAttention
from msda_plugin.layers.attention_weights import attention_weights
from msda_plugin.layers.token_layout import map_to_tokens, merge_heads, tokens_to_map


def randomize(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


@pytest.mark.parametrize('biased', [False, True])
def test_equals_scaled_dot_product_attention(biased):
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    bias = torch.randn(3, 5, 7) if biased else None
    weights = attention_weights(query, key, bias)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(weights @ value, F.scaled_dot_product_attention(query, key, value, bias))


@pytest.mark.parametrize('sr_ratio', [1, 4])
def test_scales_reproduce_shunted_attention(sr_ratio):
    layer = randomize(ShuntedSelfAttention(32, num_heads=4, sr_ratio=sr_ratio))
    x = torch.randn(2, 9 * 10, 32, dtype=torch.float64)
    scales = layer.scales(x, (9, 10))
    assert [scale.rate for scale in scales] == ([1] if sr_ratio == 1 else [4, 2])
    assert [scale.key.shape[2] for scale in scales] == ([90] if sr_ratio == 1 else [2 * 2, 4 * 5])
    out = torch.cat([merge_heads(attention_weights(scale.query, scale.key) @ scale.value) for scale in scales], -1)
    if sr_ratio == 1:
        out = out + map_to_tokens(layer.local_enhancement(tokens_to_map(merge_heads(scales[0].value), (9, 10))))
    torch.testing.assert_close(layer(x, (9, 10)), layer.proj(out))


@pytest.mark.parametrize('positional', ['none', 'rpe_table', 'log_cpb', 'fixed_pe'])
def test_attention_inputs_reproduce_deformable_multi_head_attention(positional):
    layer = randomize(DeformableMultiHeadAttention(32, 4, 2, map_size=(8, 10), stride=2, positional=positional))
    x = torch.randn(2, 32, 8, 10, dtype=torch.float64)
    inputs = layer.attention_inputs(x)
    bias = inputs.bias and inputs.bias(slice(None))
    out = layer.proj(merge_heads(attention_weights(inputs.query, inputs.key, bias) @ inputs.value))
    expected, points = layer(x, return_points=True)
    torch.testing.assert_close(map_to_tokens(expected), out)
    assert torch.equal(points.positions, inputs.points.positions)

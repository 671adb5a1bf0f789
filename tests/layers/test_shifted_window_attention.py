"""Window attention equals MMDetection's at any map size, without a mask of all windows."""

import pytest
import torch
from mmdet.models.backbones.swin import ShiftWindowMSA
from torch.nn import functional as F

from msda_plugin.layers import ShiftedWindowAttention
from msda_plugin.registry import MODELS

# (H, W): windows that fit, windows that do not, one column of windows, less than a window, less than the shift, a pixel
SIZES = [(14, 21), (10, 13), (20, 7), (5, 3), (2, 2), (1, 1)]
# (window, shift): W-MSA, SW-MSA rounded down and up, and the smallest and the largest shift
WINDOWS = [(7, 0), (7, 3), (7, 4), (4, 1), (4, 3), (1, 0)]


def build_pair(window_size, shift_size, **fields):
    """msda_plugin's and MMDetection's layer with the same random weights, in float64."""
    torch.manual_seed(0)
    fields = dict(embed_dims=16, num_heads=4, window_size=window_size, shift_size=shift_size) | fields
    ours = MODELS.build(dict(type='msda_plugin.ShiftedWindowAttention', **fields)).double()
    theirs = ShiftWindowMSA(**fields).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_tokens(hw_shape, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, hw_shape[0] * hw_shape[1], 16, dtype=dtype, generator=generator).requires_grad_()


def run(layer, x, hw_shape):
    """The output, and the gradients of a weighted sum of it."""
    out = layer(x, hw_shape)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize('hw_shape', SIZES, ids=str)
@pytest.mark.parametrize('window_size, shift_size', WINDOWS)
def test_equals_mmdetection(window_size, shift_size, hw_shape):
    ours, theirs = build_pair(window_size, shift_size)
    x = make_tokens(hw_shape)
    torch.testing.assert_close(run(ours, x, hw_shape), run(theirs, x, hw_shape), rtol=0, atol=1e-10)


@pytest.mark.parametrize('fields', [dict(qkv_bias=False), dict(qk_scale=0.3), dict(num_heads=1)], ids=str)
def test_equals_mmdetection_with_other_options(fields):
    ours, theirs = build_pair(7, 3, **fields)
    x = make_tokens((10, 13), batch=1)
    torch.testing.assert_close(run(ours, x, (10, 13)), run(theirs, x, (10, 13)), rtol=0, atol=1e-10)


def test_has_the_weights_and_initialization_of_mmdetection():
    layers = []
    for kind in (ShiftedWindowAttention, ShiftWindowMSA):
        torch.manual_seed(3)
        layers.append(kind(16, 4, window_size=7))
        layers[-1].init_weights()
    ours, theirs = (layer.state_dict() for layer in layers)
    assert list(ours) == list(theirs) and ours['w_msa.relative_position_bias_table'].std() > 0
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_non_contiguous_tokens():
    ours, _ = build_pair(7, 3)
    x = make_tokens((9, 11)).detach()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(ours(strided, (9, 11)), ours(x, (9, 11)), rtol=0, atol=1e-12)


def test_no_mask_of_all_windows(monkeypatch):
    """With 9 windows of 16 pixels, masks of all windows would have at least 9 x 16 x 16 elements."""
    sizes, attend = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask, *args, **kwargs):
        sizes.append((len(query), tuple(attn_mask.shape)))
        return attend(query, key, value, attn_mask, *args, **kwargs)

    ours, _ = build_pair(4, 2)
    x = make_tokens((12, 12))
    monkeypatch.setattr(F, 'scaled_dot_product_attention', record)
    ours(x, (12, 12))
    assert sizes == [(images_windows, (1, 4, 16, 16)) for images_windows in (8, 4, 4, 2)]


def test_dropout_acts_in_training_only():
    layer, _ = build_pair(7, 3, attn_drop_rate=0.5)
    x = make_tokens((8, 8))
    assert torch.equal(layer.eval()(x, (8, 8)), layer(x, (8, 8)))
    assert not torch.equal(layer.train()(x, (8, 8)), layer(x, (8, 8)))
    stacked, _ = build_pair(7, 3, proj_drop_rate=0.5, dropout_layer=dict(type='DropPath', drop_prob=0.5))
    outs = stacked.train()(make_tokens((8, 8), batch=64), (8, 8))
    dropped = (outs == 0).flatten(1).double().mean(1)
    assert 10 < (dropped == 1).sum() < 54 and 0.4 < dropped[dropped < 1].mean() < 0.6


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shift_size', [0, 3])
def test_autocast(shift_size, dtype):
    ours, theirs = (layer.float() for layer in build_pair(7, shift_size))
    x = make_tokens((10, 13), dtype=torch.float32)
    exact, _ = run(theirs, x, (10, 13))
    with torch.autocast('cpu', dtype):
        out, gradients = run(ours, x, (10, 13))
        reference, _ = run(theirs, x, (10, 13))
    assert out.dtype == dtype and all(gradient.isfinite().all() for gradient in gradients)
    assert (out - exact).abs().mean() <= 2 * (reference - exact).abs().mean()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(embed_dims=30, num_heads=4), 'embed_dims=30 is not a multiple of num_heads=4'),
        (dict(embed_dims=32, num_heads=0), 'embed_dims=32 is not a multiple of num_heads=0'),
        (dict(embed_dims=32, num_heads=4, window_size=7, shift_size=7), 'shift_size=7 does not fit window_size=7'),
        (dict(embed_dims=32, num_heads=4, shift_size=-1), 'shift_size=-1 does not fit'),
        (dict(embed_dims=32, num_heads=4, window_size=0), 'window_size=0'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ShiftedWindowAttention(**options)


def test_bad_input():
    layer = ShiftedWindowAttention(16, 4)
    with pytest.raises(ValueError, match=r'\(1, 63, 16\) for a 8x8 map; expected \(B, 64, 16\)'):
        layer(torch.rand(1, 63, 16), (8, 8))
    with pytest.raises(ValueError, match=r'expected \(B, 64, 16\)'):
        layer(torch.rand(1, 64, 8), (8, 8))

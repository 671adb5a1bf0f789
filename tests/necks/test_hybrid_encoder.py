"""The hybrid encoder of RT-DETR and D-FINE, against transformers' models with random weights."""

import pytest
import torch
from torch import nn

from msda_plugin.convert.rtdetr import convert_neck
from msda_plugin.necks import HybridEncoder
from msda_plugin.registry import MODELS

CHANNELS, STRIDES, SIZE = (16, 32, 64), (8, 16, 32), (96, 160)


def maps(batch=2, channels=CHANNELS, size=SIZE, strides=STRIDES):
    torch.manual_seed(0)
    return [torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(channels, strides, strict=True)]


def small(variant='rtdetr', **fields):
    fields = dict(num_heads=4, feedforward_channels=48, num_blocks=2, expansion=0.5) | fields
    return MODELS.build(
        dict(type='msda_plugin.HybridEncoder', in_channels=CHANNELS, out_channels=32, variant=variant, **fields)
    )


def randomize(module):
    """Random parameters and statistics of all norms, so that no layer is close to the identity."""
    torch.manual_seed(1)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
            child.running_mean.uniform_(-0.5, 0.5)
            child.running_var.uniform_(0.5, 1.5)
    return module


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def transformers_encoder(variant):
    """transformers' encoder with its input projections, named as in convert_neck."""
    transformers = pytest.importorskip('transformers')
    fields = dict(
        encoder_in_channels=list(CHANNELS),
        encoder_hidden_dim=32,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        hidden_expansion=0.5,
        feat_strides=list(STRIDES),
    )
    if variant == 'rtdetr':
        from transformers.models.rt_detr.modeling_rt_detr import RTDetrHybridEncoder as Encoder

        config = transformers.RTDetrConfig(**fields)
    else:
        from transformers.models.d_fine.modeling_d_fine import DFineHybridEncoder as Encoder

        config = transformers.DFineConfig(**fields, depth_mult=1.0)
    config._attn_implementation = 'eager'
    module = nn.Module()
    module.encoder = Encoder(config)
    module.input_proj = nn.ModuleList(
        [nn.Sequential(nn.Conv2d(c, 32, 1, bias=False), nn.BatchNorm2d(32)) for c in CHANNELS]
    )
    return randomize(module)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('variant', ['rtdetr', 'dfine'])
def test_equals_transformers(variant, training):
    stock = transformers_encoder(variant).train(training).double()
    state_dict = {key.removeprefix('encoder.'): value for key, value in stock.state_dict().items()}
    conversion = convert_neck(state_dict, transformers=True, dfine=variant == 'dfine')
    assert conversion.taken.keys() == state_dict.keys()
    ours = small(variant, num_blocks=3).train(training).double()
    ours.load_state_dict(conversion.state_dict)

    inputs, same = ([x.double().requires_grad_() for x in maps()] for _ in range(2))
    outs = ours(inputs)
    expected = stock.encoder([proj(x) for proj, x in zip(stock.input_proj, same, strict=True)]).last_hidden_state
    for out, other in zip(outs, expected, strict=True):
        assert_close(out, other)
    weights = [torch.randn_like(out) for out in outs]
    for result in (outs, expected):
        sum((out * w).sum() for out, w in zip(result, weights, strict=True)).backward()
    for x, other in zip(inputs, same, strict=True):
        assert_close(x.grad, other.grad)
    # Every parameter has transformers' gradient.
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    gradients = {name.removeprefix('encoder.'): grad for name, grad in gradients.items()}
    converted = convert_neck(gradients, transformers=True, dfine=variant == 'dfine').state_dict
    assert converted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, converted[name])


@pytest.mark.parametrize('variant', ['rtdetr', 'dfine'])
def test_fuse_keeps_the_results(variant):
    neck = randomize(small(variant)).eval()
    with torch.no_grad():
        expected = neck(maps())
        fused = neck.fuse()(maps())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in neck.modules())
    assert not any('conv2.conv' in name and 'bottlenecks' in name for name, _ in neck.named_parameters())
    for out, other in zip(fused, expected, strict=True):
        assert_close(out, other)
    neck.fuse()  # a second call changes nothing
    with torch.no_grad():
        assert torch.equal(neck(maps())[0], fused[0])


def test_fuse_needs_batch_norms():
    with pytest.raises(TypeError, match='GroupNorm; only batch norms can be folded'):
        small(norm_cfg=dict(type='GN', num_groups=4)).fuse()


def test_odd_sizes():
    inputs = maps(size=(75, 101))
    outs = small()(inputs)
    assert [out.shape[-2:] for out in outs] == [x.shape[-2:] for x in inputs] == [(10, 13), (5, 7), (3, 4)]


def test_two_levels_and_attention_on_every_level():
    neck = MODELS.build(
        dict(
            type='msda_plugin.HybridEncoder',
            in_channels=(16, 32),
            out_channels=32,
            num_heads=4,
            variant='dfine',
            encoder_levels=(0, 1),
        )
    )
    outs = neck(maps(channels=(16, 32), strides=(16, 32)))
    assert [tuple(out.shape) for out in outs] == [(2, 32, 6, 10), (2, 32, 3, 5)]
    sum(out.sum() for out in outs).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(variant='v3'), r"variant is 'v3'; expected one of \('rtdetr', 'dfine'\)"),
        (dict(in_channels=(64,)), 'expected the channels of at least two maps'),
        (dict(encoder_levels=-1), r'encoder_levels is -1; expected a sequence of indices, such as \(-1,\)'),
        (dict(expansion=0), 'expansion=0; expected .* at least 2 of the out_channels=32 after'),
        (dict(num_blocks=-1), 'num_blocks=-1'),
        (dict(feedforward_channels=0), 'feedforward_channels=0'),
        (dict(encoder_levels=(3,)), 'there are 3 maps: use indices from 0 to 2'),
        (dict(num_heads=5), 'embed_dims=32 is not a multiple of num_heads=5'),
        (dict(out_channels=6, num_heads=2), 'out_channels=6 is not a multiple of 4'),
    ],
)
def test_bad_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        HybridEncoder(**dict(in_channels=CHANNELS, out_channels=32, num_heads=4) | fields)


def test_bad_maps():
    neck = small()
    with pytest.raises(ValueError, match=r'got 2 maps of \(16, 32\) channels; expected maps of in_channels=\(16, 32'):
        neck(maps()[:2])
    inputs = maps()
    inputs[1] = inputs[1][..., :-1]
    with pytest.raises(ValueError, match='each map must be half as high and wide as the one before it'):
        neck(inputs)

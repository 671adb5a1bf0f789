"""PVTNeck: blocks equal to MMDetection's PVT, and the cross-attention equal to its definition."""

import pytest
import torch
from mmdet.models.backbones.pvt import PVTEncoderLayer
from mmdet.models.necks import ChannelMapper
from torch.nn import functional as F

from msda_plugin.necks import PVTNeck

CHANNELS = [24, 40]


def build(**fields):
    """A neck in float64 with layer scales of 1."""
    torch.manual_seed(0)
    neck = PVTNeck(CHANNELS, 32, num_outs=3, num_heads=4, layer_scale_init_value=1.0, **fields).double()
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter, mean=0.2, std=0.3)
    for name, parameter in neck.named_parameters():
        if 'scale' in name:
            torch.nn.init.ones_(parameter)
    return neck


def make_maps(sizes=((13, 10), (7, 5))):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, channels, *size, dtype=torch.float64, generator=generator)
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def channel_maps(neck, inputs):
    mapper = ChannelMapper(
        CHANNELS, 32, 1, norm_cfg=dict(type='GN', num_groups=32), act_cfg=None, bias=True, num_outs=3
    )
    mapper.double().load_state_dict(neck.state_dict(), strict=False)
    return mapper(inputs)


def as_pvt_layer(block, sr_ratio):
    """MMDetection's PVT layer with the weights of a block."""
    layer = PVTEncoderLayer(32, 4, feedforward_channels=128, sr_ratio=sr_ratio, use_conv_ffn=True).double()
    names = {'ffn.fc1': 'ffn.layers.0', 'ffn.dwconv': 'ffn.layers.1', 'ffn.fc2': 'ffn.layers.4'}
    expected = layer.state_dict()
    weights = {}
    for name, value in block.state_dict().items():
        if 'scale' not in name:
            parent, leaf = name.rsplit('.', 1)
            name = f'{names.get(parent, parent)}.{leaf}'
            weights[name] = value.view_as(expected[name])
    layer.load_state_dict(weights)
    return layer


def test_blocks_equal_pvt():
    neck, inputs = build(depth=2, fusion=None), make_maps()
    outs, maps = neck(inputs), channel_maps(neck, inputs)
    for level, sr_ratio in enumerate((2, 1)):
        hw_shape = tuple(maps[level].shape[2:])
        x = maps[level].flatten(2).mT
        for block in neck.blocks[level]:
            x = as_pvt_layer(block, sr_ratio)(x, hw_shape)
        torch.testing.assert_close(outs[level].flatten(2).mT, x, rtol=1e-12, atol=1e-10)
    assert torch.equal(outs[2], maps[2])


def test_the_finer_map_attends_to_the_reduced_coarser_map():
    neck, inputs = build(depth=0, fusion='cross_attention', sr_ratios=[4, 2]), make_maps()
    outs, (fine, coarse, _) = neck(inputs), channel_maps(neck, inputs)
    fusion = neck.fusions[0]
    attn = fusion.attn
    query, key = fusion.query_norm(fine.flatten(2).mT), fusion.key_norm(coarse.flatten(2).mT)
    reduced = attn.norm(F.conv2d(key.mT.unflatten(2, (7, 5)), attn.sr.weight, attn.sr.bias, stride=2).flatten(2).mT)
    assert reduced.shape[1] == 3 * 2
    attended, _ = torch.nn.MultiheadAttention.forward(
        attn.attn, query.transpose(0, 1), reduced.transpose(0, 1), reduced.transpose(0, 1)
    )
    expected = fine + attended.permute(1, 2, 0).unflatten(2, (13, 10))
    torch.testing.assert_close(outs[0], expected, rtol=0, atol=1e-10)
    assert torch.equal(outs[1], coarse)


@pytest.mark.parametrize('fields, ratios', [({}, [8, 4, 2, 1]), (dict(sr_ratios=(4, 4, 1, 1)), [4, 4, 1, 1])], ids=str)
def test_reductions(fields, ratios):
    neck = PVTNeck([32] * 4, 32, fusion='cross_attention', **fields)
    assert [blocks[0].attn.sr_ratio for blocks in neck.blocks] == ratios
    assert [fusion.attn.sr_ratio for fusion in neck.fusions] == ratios[1:]


def test_linear_attention():
    neck, inputs = build(linear=True), make_maps()
    pooled = []
    for blocks in neck.blocks:
        blocks[0].attn.sr.register_forward_pre_hook(lambda module, args: pooled.append(args[0].shape[2:]))
    assert all(out.isfinite().all() for out in neck(inputs))
    assert pooled == [(7, 7), (7, 7)]

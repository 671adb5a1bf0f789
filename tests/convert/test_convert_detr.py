"""Conversion of DETR's published checkpoints, which then compute the same as the published architecture.

``PublishedDETR`` is that architecture (the paper's appendix A.3 and figure 10) in plain PyTorch, with the keys of the
published checkpoints.
"""

import copy
import math

import pytest
import torch
from mmdet.structures import DetDataSample
from torch import nn
from torch.nn import functional as F

from msda_plugin.convert import FAMILIES, convert, convert_state_dict
from msda_plugin.convert.coco import COCO_IDS
from msda_plugin.registry import MODELS

FAMILY = 'detr'
DIMS, HEADS, FFN, QUERIES, CLASSES = 32, 4, 48, 7, 5
IMAGE = (96, 128)
VALID = [(96, 128), (80, 104)]


class Layer(nn.Module):
    """Post-norm encoder layer, or decoder layer if ``cross`` is set."""

    def __init__(self, cross):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIMS, HEADS, batch_first=True)
        if cross:
            self.multihead_attn = nn.MultiheadAttention(DIMS, HEADS, batch_first=True)
            self.norm3 = nn.LayerNorm(DIMS)
        self.linear1, self.linear2 = nn.Linear(DIMS, FFN), nn.Linear(FFN, DIMS)
        self.norm1, self.norm2 = nn.LayerNorm(DIMS), nn.LayerNorm(DIMS)

    def forward(self, x, position, mask=None, memory=None, memory_position=None, memory_mask=None):
        x = self.norm1(x + self.self_attn(x + position, x + position, x, key_padding_mask=mask)[0])
        last_norm = self.norm2
        if memory is not None:
            attended = self.multihead_attn(x + position, memory + memory_position, memory, key_padding_mask=memory_mask)
            x = self.norm2(x + attended[0])
            last_norm = self.norm3
        return last_norm(x + self.linear2(F.relu(self.linear1(x))))


class PublishedDETR(nn.Module):
    def __init__(self, channels=24, num_classes=CLASSES):
        super().__init__()
        self.input_proj = nn.Conv2d(channels, DIMS, 1)
        self.query_embed = nn.Embedding(QUERIES, DIMS)
        self.class_embed = nn.Linear(DIMS, num_classes + 1)
        self.bbox_embed = nn.ModuleDict(
            dict(layers=nn.ModuleList([nn.Linear(DIMS, DIMS), nn.Linear(DIMS, DIMS), nn.Linear(DIMS, 4)]))
        )
        self.transformer = nn.ModuleDict(
            dict(
                encoder=nn.ModuleDict(dict(layers=nn.ModuleList([Layer(False) for _ in range(2)]))),
                decoder=nn.ModuleDict(
                    dict(layers=nn.ModuleList([Layer(True) for _ in range(3)]), norm=nn.LayerNorm(DIMS))
                ),
            )
        )

    def forward(self, features, mask):
        """Map (bs, channels, h, w) and mask (bs, h, w), True on padding -> logits and boxes of every layer."""
        position = sine_positions(mask).to(features.dtype).flatten(1, 2)
        memory, mask = self.input_proj(features).flatten(2).transpose(1, 2), mask.flatten(1)
        for layer in self.transformer['encoder']['layers']:
            memory = layer(memory, position, mask)
        query_position = self.query_embed.weight.expand(len(memory), -1, -1)
        x, outputs = torch.zeros_like(query_position), []
        for layer in self.transformer['decoder']['layers']:
            x = layer(x, query_position, memory=memory, memory_position=position, memory_mask=mask)
            outputs.append(self.transformer['decoder']['norm'](x))
        outputs = torch.stack(outputs)
        first, second, last = self.bbox_embed['layers']
        return self.class_embed(outputs), last(F.relu(second(F.relu(first(outputs))))).sigmoid()


def sine_positions(mask):
    """(bs, h, w, DIMS): sines and cosines of 2 pi times the position, 0 to 1 over the valid pixels; y before x."""
    halves = []
    for dim in (1, 2):
        count = (~mask).double().cumsum(dim)
        place = count / (count.amax(dim, keepdim=True) + 1e-6) * 2 * math.pi
        frequency = 10000 ** -(torch.arange(0, DIMS // 2, 2) / (DIMS // 2)).double()
        angle = place[..., None] * frequency
        halves.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(-2))
    return torch.cat(halves, -1)


class RecordedMap(nn.Module):
    """Stands in for a backbone: the same map for every image."""

    def forward(self, images):
        return (
            torch.randn(2, 24, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(images.dtype),
        )


def published(**sizes):
    torch.manual_seed(0)
    model = PublishedDETR(**sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def build_detector(num_classes=CLASSES, backbone=None, in_channels=24):
    attention = dict(embed_dims=DIMS, num_heads=HEADS, batch_first=True)
    ffn = dict(embed_dims=DIMS, feedforward_channels=FFN)
    return MODELS.build(
        dict(
            type='msda_plugin.DETR',
            num_queries=QUERIES,
            backbone=backbone or dict(type=RecordedMap),
            neck=dict(
                type='mmdet.ChannelMapper',
                in_channels=[in_channels],
                kernel_size=1,
                out_channels=DIMS,
                num_outs=1,
                act_cfg=None,
                norm_cfg=None,
            ),
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=dict(attention), ffn_cfg=dict(ffn))),
            decoder=dict(
                num_layers=3,
                layer_cfg=dict(self_attn_cfg=dict(attention), cross_attn_cfg=dict(attention), ffn_cfg=dict(ffn)),
            ),
            positional_encoding=dict(num_feats=DIMS // 2, normalize=True),
            bbox_head=dict(type='msda_plugin.DETRHead', num_classes=num_classes, embed_dims=DIMS),
        )
    )


@pytest.mark.parametrize('valid', [VALID, [IMAGE, IMAGE]], ids=['padded', 'unpadded'])
def test_equals_the_published_model(valid):
    upstream = published()
    conversion = convert({'model': upstream.state_dict()}, FAMILY)
    assert conversion.taken.keys() == upstream.state_dict().keys() and not conversion.dropped
    model = build_detector().double().eval()
    model.load_state_dict(conversion.state_dict)

    (features,) = RecordedMap()(torch.zeros(1, dtype=torch.float64))
    mask = torch.ones(2, *features.shape[-2:], dtype=torch.bool)
    for image, (height, width) in zip(mask, valid, strict=True):
        image[: math.ceil(height / 16), : math.ceil(width / 16)] = False
    samples = [DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=IMAGE)) for shape in valid]
    with torch.no_grad():
        outputs = model(torch.zeros(2, 3, *IMAGE, dtype=torch.float64), samples, mode='tensor')
        for output, expected in zip(outputs, upstream(features, mask), strict=True):
            # MMDetection's position embedding is float32 in any model.
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_92_classes_become_81_by_category_id():
    upstream = published(num_classes=91).state_dict()
    for name in ('weight', 'bias'):
        rows = torch.arange(92.0).view(92, *[1] * (upstream[f'class_embed.{name}'].dim() - 1))
        upstream[f'class_embed.{name}'] = rows.expand_as(upstream[f'class_embed.{name}'])
    converted = convert_state_dict(upstream, FAMILY)
    assert converted['bbox_head.fc_cls.bias'].tolist() == [*COCO_IDS, 91]
    assert converted['bbox_head.fc_cls.weight'][:, 0].tolist() == [*COCO_IDS, 91]
    build_detector(80).load_state_dict(converted)


def test_backbone_without_batch_counts():
    """The published checkpoints have no ``num_batches_tracked``, and the conversion does not require it."""
    backbone = dict(
        type='mmdet.ResNet',
        depth=18,
        base_channels=4,
        stem_channels=4,
        out_indices=(3,),
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
    )
    model = build_detector(backbone=backbone, in_channels=32)
    upstream = published(channels=32).state_dict()
    for key, value in model.backbone.state_dict().items():
        if 'num_batches_tracked' not in key:
            upstream[f'backbone.0.body.{key}'] = torch.randn_like(value)
    converted = convert_state_dict(upstream, FAMILY)
    model.load_state_dict(converted)
    torch.testing.assert_close(model.backbone.layer1[0].conv1.weight, upstream['backbone.0.body.layer1.0.conv1.weight'])


def test_converted_state_dict_is_unchanged():
    assert FAMILY in FAMILIES
    converted = convert_state_dict(published().state_dict(), FAMILY)
    assert convert_state_dict(converted, FAMILY) == converted


@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda d: d.pop('transformer.decoder.layers.1.norm3.bias'),
            r"missing keys \['transformer.decoder.layers.1.norm3.bias'\], unexpected keys \[\]",
        ),
        (lambda d: d.update({'mask_head.lay1.weight': torch.zeros(1)}), r"unexpected keys \['mask_head.lay1.weight'\]"),
        (
            lambda d: d.update({'transformer.encoder.layers.0.self_attn.sampling_offsets.bias': torch.zeros(1)}),
            "use family 'deformable_detr'",
        ),
        (lambda d: d.update({'transformer.encoder.norm.weight': torch.zeros(1)}), 'pre-norm DETR'),
        (lambda d: [d.pop(key) for key in list(d)[1:]], 'missing keys'),
    ],
)
def test_unsupported_state_dicts_are_refused(change, message):
    upstream = copy.copy(published().state_dict())
    change(upstream)
    with pytest.raises(ValueError, match=message):
        convert(upstream, FAMILY)

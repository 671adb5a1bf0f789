"""Conversion of Deformable DETR's published checkpoints, against golden outputs of the published model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from torch import nn

from msda_plugin.convert import convert, convert_state_dict
from msda_plugin.convert.coco import COCO_IDS
from msda_plugin.registry import MODELS

GOLDEN = Path(__file__).parents[1] / 'golden'
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

FAMILY = 'deformable_detr'
CASES = {
    'base': dict(dims=64, heads=4),
    'refine': dict(dims=64, heads=4, with_box_refine=True),
    'two_stage': dict(dims=256, heads=8, with_box_refine=True, as_two_stage=True),
}
IMAGE = (96, 128)
VALID = [(96, 128), (80, 104)]


class RecordedMaps(nn.Module):
    """Replaces the backbone: the same three maps for every image."""

    def forward(self, images):
        return tuple(
            recipe.tensor(f'feat2x{c}x{h}x{w}', (2, c, h, w)) for c, h, w in ((32, 12, 16), (64, 6, 8), (96, 3, 4))
        )


def upstream_state_dict(case):
    shapes = json.loads((GOLDEN / 'deformable_detr_state_dict.json').read_text())[case]
    state_dict = recipe.fill({key: torch.zeros(shape) for key, shape in shapes.items()})
    return {key: value * 0.5 if key.endswith('sampling_offsets.weight') else value for key, value in state_dict.items()}


def build_detector(dims, heads, num_classes=7, **fields):
    attention = dict(embed_dims=dims, num_heads=heads, dropout=0.0, batch_first=True)
    ffn = dict(embed_dims=dims, feedforward_channels=128)
    return MODELS.build(
        dict(
            type='msda_plugin.DeformableDETR',
            num_queries=20,
            backbone=dict(type=RecordedMaps),
            neck=dict(
                type='mmdet.ChannelMapper',
                in_channels=[32, 64, 96],
                kernel_size=1,
                out_channels=dims,
                num_outs=4,
                act_cfg=None,
                norm_cfg=dict(type='GN', num_groups=32),
                bias=True,
            ),
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
            decoder=dict(num_layers=3, layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn)),
            positional_encoding=dict(num_feats=dims // 2, normalize=True, offset=-0.5),
            bbox_head=dict(
                type='msda_plugin.DeformableDETRHead',
                num_classes=num_classes,
                embed_dims=dims,
                loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True),
            ),
            **fields,
        )
    )


def assert_golden(name, actual, golden):
    expected = torch.from_numpy(golden[name])
    assert actual.shape == expected.shape, name
    assert (actual - expected).abs().max() <= 1e-4 * max(1, expected.abs().max()), name


@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    golden = np.load(GOLDEN / f'deformable_detr_{case}.npz')
    upstream = upstream_state_dict(case)
    conversion = convert(upstream, FAMILY)
    model = build_detector(**CASES[case]).eval()
    model.load_state_dict(conversion.state_dict)
    assert conversion.taken.keys() | conversion.dropped.keys() == upstream.keys()

    samples = [DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=IMAGE)) for shape in VALID]
    images = torch.zeros(2, 3, *IMAGE)
    with torch.no_grad():
        logits, boxes = model(images, samples, mode='tensor')
        first_stage = model.train().forward_transformer(model.extract_feat(images), samples)
    compared = set()
    for name, layer in (('pred', 2), ('aux0', 0), ('aux1', 1)):
        assert_golden(f'{name}_logits', logits[layer], golden)
        assert_golden(f'{name}_boxes', boxes[layer], golden)
        compared |= {f'{name}_logits', f'{name}_boxes'}
    if case == 'two_stage':
        assert_golden('enc_logits', first_stage['enc_outputs_class'], golden)
        assert_golden('enc_boxes', first_stage['enc_outputs_coord'], golden)
        compared |= {'enc_logits', 'enc_boxes'}
    assert compared == set(golden.files)


def with_91_classes(case):
    upstream = upstream_state_dict(case)
    for key in upstream:
        if 'class_embed.' in key:
            rows = torch.arange(91.0).view(91, *[1] * (upstream[key].dim() - 1))
            upstream[key] = rows.expand(91, *upstream[key].shape[1:])
    return upstream


def test_91_classes_become_80_by_category_id():
    assert len(COCO_IDS) == 80 and COCO_IDS[:13] == [*range(1, 12), 13, 14] and COCO_IDS[-1] == 90
    converted = convert_state_dict(with_91_classes('refine'), FAMILY)
    for i in range(3):
        assert converted[f'bbox_head.cls_branches.{i}.bias'].tolist() == COCO_IDS
        assert converted[f'bbox_head.cls_branches.{i}.weight'][:, 0].tolist() == COCO_IDS
    build_detector(**CASES['refine'], num_classes=80).load_state_dict(converted)


def test_classifier_of_proposals_keeps_row_0():
    converted = convert_state_dict(with_91_classes('two_stage'), FAMILY)
    assert converted['bbox_head.cls_branches.2.bias'].tolist() == COCO_IDS
    assert converted['bbox_head.cls_branches.3.bias'].tolist() == [0, *COCO_IDS[1:]]


def test_91_classes_shared_with_proposals_are_refused():
    upstream = {
        key: value
        for key, value in with_91_classes('two_stage').items()
        if not key.startswith('transformer.decoder.bbox_embed')
    }
    with pytest.raises(ValueError, match='two stages without box refinement'):
        convert(upstream, FAMILY)


def test_repeated_heads_are_dropped():
    repeats = ('transformer.decoder.bbox_embed.', 'transformer.decoder.class_embed.')
    upstream = upstream_state_dict('two_stage')
    assert convert(upstream, FAMILY).dropped.keys() == {key for key in upstream if key.startswith(repeats)}
    assert not convert(upstream_state_dict('base'), FAMILY).dropped


def test_backbone_keys_and_single_scale():
    upstream = upstream_state_dict('base')
    for i in (1, 2, 3):
        for name in ('0.weight', '0.bias', '1.weight', '1.bias'):
            del upstream[f'input_proj.{i}.{name}']
    upstream['backbone.0.body.layer1.0.conv1.weight'] = torch.zeros(1)
    converted = convert_state_dict({'model': upstream}, FAMILY)
    assert 'backbone.layer1.0.conv1.weight' in converted
    assert [key for key in converted if key.startswith('neck.')] == [
        'neck.convs.0.conv.weight',
        'neck.convs.0.conv.bias',
        'neck.convs.0.gn.weight',
        'neck.convs.0.gn.bias',
    ]


def test_converted_state_dict_is_unchanged():
    converted = convert_state_dict(upstream_state_dict('base'), FAMILY)
    assert convert_state_dict(converted, FAMILY) == converted


def test_unsupported_state_dicts_are_refused():
    upstream = upstream_state_dict('base')
    upstream['transformer.dropout_mask'] = upstream.pop('transformer.encoder.layers.1.norm2.bias')
    with pytest.raises(
        ValueError,
        match=r"missing keys \['transformer.encoder.layers.1.norm2.bias'\], unexpected keys "
        r"\['transformer.dropout_mask'\]",
    ):
        convert(upstream, FAMILY)
    upstream['transformer.decoder.layers.0.multihead_attn.in_proj_bias'] = torch.zeros(1)
    with pytest.raises(ValueError, match="use family 'detr'"):
        convert(upstream, FAMILY)
    with pytest.raises(ValueError, match='missing keys'):
        convert({'encoder.weight': torch.zeros(1)}, FAMILY)

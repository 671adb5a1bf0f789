"""Conversion of DAT's published checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from msda_plugin.backbones.dat import DAT
from msda_plugin.convert import convert, convert_state_dict
from msda_plugin.layers import DeformableMultiHeadAttention

GOLDEN = Path(__file__).parents[1] / 'golden'
FAMILY = 'dat'
NORMS = {f'norms.{i}.{name}' for i in range(4) for name in ('weight', 'bias')}


def upstream_state_dict(case='dat_t_cvpr22'):
    shapes = json.loads((GOLDEN / 'dat_state_dict.json').read_text())[case]
    return {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}


def shapes_of(state_dict):
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def test_every_key_of_the_published_model_is_converted():
    upstream = upstream_state_dict()
    conversion = convert(upstream, FAMILY)
    with torch.device('meta'):
        expected = DAT('tiny').state_dict()
    assert shapes_of(conversion.state_dict) == shapes_of(expected)
    assert conversion.taken.keys() | conversion.dropped.keys() == upstream.keys()
    assert not conversion.taken.keys() & conversion.dropped.keys()
    reasons = {}
    for key, reason in conversion.dropped.items():
        reasons.setdefault(reason, set()).add(key.rsplit('.', 1)[-1] if key.startswith('stages') else key)
    assert reasons == {
        'classification layer, not part of a backbone': {
            'cls_norm.norm.weight',
            'cls_norm.norm.bias',
            'cls_head.weight',
            'cls_head.bias',
        },
        'computed from the window size': {'relative_position_index'},
        'computed from the sizes of the map and the window': {'attn_mask'},
    }


def test_norms_of_the_maps_are_added_if_missing():
    upstream = {key: torch.zeros(value.shape) for key, value in upstream_state_dict().items()}
    upstream['norms.2.norm.weight'] = torch.full((384,), 5.0)
    upstream['norms.2.norm.bias'] = torch.full((384,), 7.0)
    conversion = convert(upstream, FAMILY)
    assert conversion.taken['norms.2.norm.weight'] == 'norms.2.weight'
    norms = {key: value.unique().tolist() for key, value in conversion.state_dict.items() if key in NORMS}
    assert norms == {
        f'norms.{i}.{name}': [value]
        for i in range(4)
        for name, value in (('weight', 5.0 if i == 2 else 1.0), ('bias', 7.0 if i == 2 else 0.0))
    }


@pytest.mark.parametrize(
    'case, options',
    [
        ('attn_v1_rpe', dict(map_size=14)),
        ('attn_v2_dwc', dict(positional='dwc_pe', kernel_size=3)),
        ('attn_v2_cpb', dict(positional='log_cpb', kernel_size=3)),
        ('attn_v1_rpe', dict(positional='none')),
    ],
)
def test_an_attention_layer(case, options):
    upstream = upstream_state_dict(case)
    if options.get('positional') == 'none':
        del upstream['rpe_table']
    dims, heads, groups = (96, 6, 3) if case == 'attn_v1_rpe' else (64, 4, 2)
    with torch.device('meta'):
        expected = DeformableMultiHeadAttention(dims, heads, groups, **options).state_dict()
    converted = convert_state_dict(upstream, FAMILY)
    assert shapes_of(converted) == shapes_of(expected)
    assert convert_state_dict(converted, FAMILY) == converted


@pytest.mark.parametrize('wrapper', ['model', 'state_dict'])
def test_wrapped_and_converted_state_dicts(wrapper):
    upstream = upstream_state_dict()
    converted = convert_state_dict({wrapper: upstream, 'epoch': 299}, FAMILY)
    assert converted.keys() == convert_state_dict(upstream, FAMILY).keys()
    assert convert_state_dict(converted, FAMILY) == converted


def test_missing_and_unexpected_keys_are_named():
    upstream = upstream_state_dict()
    upstream['stages.2.attns.1.local_perception.weight'] = upstream.pop('stages.2.attns.1.proj_k.weight')
    with pytest.raises(
        ValueError,
        match=r"missing keys \['stages.2.attns.1.proj_k.weight'\], "
        r"unexpected keys \['stages.2.attns.1.local_perception.weight'\]",
    ):
        convert_state_dict(upstream, FAMILY)


def test_state_dict_of_another_model_is_refused():
    with pytest.raises(ValueError, match="does not fit family 'dat': expected .*; got \\['layer1.weight'\\]. If"):
        convert_state_dict({'layer1.weight': torch.zeros(1)}, FAMILY)

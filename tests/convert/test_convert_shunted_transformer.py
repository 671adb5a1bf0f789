"""Conversion of Shunted Transformer's published checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.convert import convert, convert_state_dict

GOLDEN = Path(__file__).parents[1] / 'golden'
FAMILY = 'shunted_transformer'


def upstream_state_dict(size):
    shapes = json.loads((GOLDEN / f'shunted_{size}_state_dict.json').read_text())
    return {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_every_key_of_the_published_sizes_is_converted(arch):
    upstream = upstream_state_dict(arch[0])
    conversion = convert(upstream, FAMILY)
    with torch.device('meta'):
        expected = {key: value.shape for key, value in ShuntedTransformer(arch).state_dict().items()}
    assert {key: value.shape for key, value in conversion.state_dict.items()} == expected
    assert conversion.taken.keys() | conversion.dropped.keys() == upstream.keys()
    assert conversion.dropped.keys() == {'head.weight', 'head.bias'}


@pytest.mark.parametrize('wrapper', ['model', 'state_dict'])
def test_wrapped_and_converted_state_dicts(wrapper):
    upstream = upstream_state_dict('t')
    converted = convert_state_dict({wrapper: upstream, 'epoch': 299}, FAMILY)
    assert converted.keys() == convert_state_dict(upstream, FAMILY).keys()
    assert convert_state_dict(converted, FAMILY) == converted


def test_model_without_qkv_bias():
    upstream = upstream_state_dict('t')
    for key in [key for key in upstream if key.endswith(('q.bias', 'kv.bias', 'kv1.bias', 'kv2.bias'))]:
        del upstream[key]
    with torch.device('meta'):
        expected = ShuntedTransformer('tiny', qkv_bias=False).state_dict()
    assert convert_state_dict(upstream, FAMILY).keys() == expected.keys()


def test_missing_and_unexpected_keys_are_named():
    upstream = upstream_state_dict('t')
    upstream['block1.0.attn.window'] = upstream.pop('block3.2.attn.sr1.weight')
    with pytest.raises(
        ValueError,
        match=r"missing keys \['block3.2.attn.sr1.weight'\], "
        r"unexpected keys \['block1.0.attn.window'\]",
    ):
        convert_state_dict(upstream, FAMILY)


@pytest.mark.parametrize('checkpoint', [{}, {'epoch': 3}, {'model': {'a': 1}}, [1, 2]])
def test_no_state_dict(checkpoint):
    with pytest.raises(ValueError, match='holds no state dict'):
        convert_state_dict(checkpoint, FAMILY)


def test_unknown_family():
    with pytest.raises(ValueError, match="unknown family 'resnet'; known: .*shunted_transformer"):
        convert_state_dict({'a': torch.zeros(1)}, 'resnet')

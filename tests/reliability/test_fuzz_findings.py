"""Regression tests for bugs found by fuzzing: crashes, tracebacks, and invalid input that was accepted."""

import json

import pytest
import torch

from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.engine.data_check import check_coco
from msda_plugin.layers import (
    DeformableMultiHeadAttention,
    MultiScaleDeformableAttention,
    ShiftedWindowAttention,
    ShuntedSelfAttention,
    SpatialReductionAttention,
)
from msda_plugin.tools.common.errors import explain, user_errors
from msda_plugin.tools.custom_data.coco import load_split


# ---- layers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'layer',
    [
        ShuntedSelfAttention,
        SpatialReductionAttention,
        ShiftedWindowAttention,
        lambda dims, heads: DeformableMultiHeadAttention(dims, heads, 1, map_size=4),
    ],
)
@pytest.mark.parametrize('dims, heads', [(0, 1), (-8, 2), (8, 0)])
def test_channels_and_heads_must_be_positive(layer, dims, heads):
    with pytest.raises(ValueError, match=f'embed_dims={dims} is not a multiple of num_heads={heads}, both at least 1'):
        layer(dims, heads)


@pytest.mark.parametrize('name', ['embed_dims', 'num_heads', 'num_levels', 'num_points'])
@pytest.mark.parametrize('number', [0, -1])
def test_sizes_of_deformable_attention_must_be_positive(name, number):
    with pytest.raises(ValueError, match=f'{name}={number}.*; expected at least 1 for each of them'):
        MultiScaleDeformableAttention(**dict(embed_dims=8, num_heads=2) | {name: number})


@pytest.mark.parametrize('layer', [ShuntedSelfAttention, SpatialReductionAttention, ShiftedWindowAttention])
@pytest.mark.parametrize('size', [(0, 5), (0, 0), (-2, -3)])
def test_empty_maps_are_rejected(layer, size):
    with pytest.raises(ValueError, match=f'got a {size[0]}x{size[1]} map; expected at least 1 pixel a side'):
        layer(8, 2)(torch.rand(1, size[0] * size[1], 8), size)


def test_empty_batches():
    layer = MultiScaleDeformableAttention(8, 2, num_levels=1, batch_first=True)
    out = layer(
        torch.rand(0, 3, 8), value=torch.rand(0, 6, 8), reference_points=torch.rand(0, 3, 1, 2), spatial_shapes=[(2, 3)]
    )
    assert out.shape == (0, 3, 8)
    for positional in ('rpe_table', 'log_cpb', 'fixed_pe', 'none'):
        layer = DeformableMultiHeadAttention(8, 2, 2, map_size=4, positional=positional)
        assert layer(torch.rand(0, 8, 4, 5)).shape == (0, 8, 4, 5)


def test_wrong_number_of_channels_of_the_value():
    layer = MultiScaleDeformableAttention(8, 2, num_levels=1, batch_first=True)
    with pytest.raises(ValueError, match=r'value \(1, 6, 9\) .* \(bs, num_keys, 8\)'):
        layer(
            torch.rand(1, 3, 8),
            value=torch.rand(1, 6, 9),
            reference_points=torch.rand(1, 3, 1, 2),
            spatial_shapes=[(2, 3)],
        )


# ---- annotation files -----------------------------------------------------------------------------------------------
def coco(**changes):
    """COCO content with one box; ``annotations__area=…`` sets a field of its records."""
    content = dict(
        images=[dict(id=1, file_name='1.png', width=9, height=9)],
        categories=[dict(id=1, name='ring')],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 3, 3], area=9, iscrowd=0)],
    )
    for path, value in changes.items():
        part, field = path.split('__')
        content[part][0][field] = value
    return content


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(images__id=[]), r'id of images\[0\] must be a number or a string, got \[\]'),
        (dict(images__id=float('nan')), 'must be a number or a string, got nan'),
        (dict(annotations__image_id={}), r'image_id of annotations\[0\] must be'),
        (dict(annotations__category_id=None), r'category_id of annotations\[0\] must be .*, got None'),
        (dict(categories__name=['ring']), r'name of categories\[0\] must be'),
        (dict(images__width='9'), "width of images.0. must be a number of pixels, got '9'"),
        (dict(images__height=10**400), r'height of images\[0\] must be a number of pixels, got 1000000.*…'),
        (dict(images__file_name=7), r'file_name of images\[0\] must be a string, got 7'),
        (dict(images__file_name='a\0b'), 'file_name'),
        (dict(annotations__area=None), r'area of annotations\[0\] must be a finite number, got None'),
        (dict(annotations__iscrowd='no'), r'iscrowd of annotations\[0\] must be 0 or 1'),
        (dict(annotations__bbox=[10**400, 1, 1, 1]), r'must be \[x, y, width, height\], got \[1000'),
        (dict(annotations__bbox=[1e308, 1, 1e308, 1]), r'must be \[x, y, width, height\], got'),
        (dict(annotations__bbox=[True, 1, 1, 1]), r'must be \[x, y, width, height\], got'),
    ],
)
def test_values_of_wrong_type(changes, message, tmp_path):
    (tmp_path / '1.png').touch()
    (tmp_path / 'train.json').write_text(json.dumps(coco(**changes)))
    with pytest.raises(ValueError, match=message):
        check_coco(tmp_path / 'train.json', tmp_path, evaluated=True)
    with pytest.raises(ValueError, match=message):
        load_split('train', tmp_path / 'train.json', tmp_path, tmp_path)


def test_boxes_of_unlisted_classes_are_checked(tmp_path):
    (tmp_path / '1.png').touch()
    (tmp_path / 'train.json').write_text(json.dumps(coco(annotations__bbox=[1, 2], annotations__category_id=9)))
    with pytest.raises(ValueError, match='must be .x, y, width, height'):
        check_coco(tmp_path / 'train.json', tmp_path)


def test_too_long_file_name(tmp_path):
    (tmp_path / 'train.json').write_text(json.dumps(coco(images__file_name='x' * 5000)))
    with pytest.raises(FileNotFoundError, match='none of the images'):
        load_split('train', tmp_path / 'train.json', tmp_path)


# ---- checkpoints and messages ---------------------------------------------------------------------------------------
def test_checkpoint_with_wrong_shapes(tmp_path):
    """The message is one line, unlike torch's with one line per key."""
    arch = dict(
        embed_dims=(8, 8, 8, 8),
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 1),
        mlp_ratios=(1, 1, 1, 1),
        sr_ratios=(4, 4, 2, 1),
        stem_convs=1,
    )
    state_dict = ShuntedTransformer(arch).state_dict()
    key = next(key for key in state_dict if key.endswith('mlp.fc1.weight'))
    torch.save(state_dict | {key: torch.zeros(3, 3)}, tmp_path / 'shunted.pth')
    model = ShuntedTransformer(arch, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'shunted.pth')))
    with pytest.raises(ValueError, match='shunted.pth does not fit this ShuntedTransformer: .*size mismatch') as raised:
        model.init_weights()
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'error',
    [
        ZeroDivisionError('division by zero'),
        OverflowError('too large'),
        MemoryError(),
        StopIteration(),
        KeyError('img'),
    ],
)
def test_every_error_has_a_message(error, capsys):
    with pytest.raises(SystemExit) as stopped, user_errors('train'):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f'msda_plugin train: {type(error).__name__}: ')
    assert explain(ValueError('one two')) == 'one two'


def test_very_long_message_is_fast(capsys):
    with pytest.raises(SystemExit), user_errors('train'):
        raise ValueError('x' * 1_000_000)
    assert len(capsys.readouterr().err) > 1_000_000

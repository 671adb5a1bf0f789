"""Conversion of ViT checkpoints of timm, MAE, ViTDet and mmpretrain."""

import pytest
import torch

from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.convert import convert, convert_state_dict

FAMILY = 'vision_transformer'
DIMS, DEPTH, ROWS = 8, 3, 9
MMPRETRAIN = {
    'norm1': 'ln1',
    'attn.qkv': 'attn.qkv',
    'attn.proj': 'attn.proj',
    'norm2': 'ln2',
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1',
}


def timm_state_dict():
    """Random values under the names of timm's ViT."""
    shapes = {
        'cls_token': (1, 1, DIMS),
        'pos_embed': (1, 1 + ROWS, DIMS),
        'patch_embed.proj.weight': (DIMS, 3, 16, 16),
        'patch_embed.proj.bias': (DIMS,),
    }
    for i in range(DEPTH):
        for name, shape in (
            ('norm1.weight', (DIMS,)),
            ('norm1.bias', (DIMS,)),
            ('attn.qkv.weight', (3 * DIMS, DIMS)),
            ('attn.qkv.bias', (3 * DIMS,)),
            ('attn.proj.weight', (DIMS, DIMS)),
            ('attn.proj.bias', (DIMS,)),
            ('norm2.weight', (DIMS,)),
            ('norm2.bias', (DIMS,)),
            ('mlp.fc1.weight', (4 * DIMS, DIMS)),
            ('mlp.fc1.bias', (4 * DIMS,)),
            ('mlp.fc2.weight', (DIMS, 4 * DIMS)),
            ('mlp.fc2.bias', (DIMS,)),
        ):
            shapes[f'blocks.{i}.{name}'] = shape
    shapes |= {'norm.weight': (DIMS,), 'norm.bias': (DIMS,), 'head.weight': (5, DIMS), 'head.bias': (5,)}
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}


def mmpretrain_state_dict():
    """The same values under mmpretrain's names."""
    names = {
        'head.weight': 'head.layers.head.weight',
        'head.bias': 'head.layers.head.bias',
        'norm.weight': 'backbone.ln1.weight',
        'norm.bias': 'backbone.ln1.bias',
        'patch_embed.proj.weight': 'backbone.patch_embed.projection.weight',
        'patch_embed.proj.bias': 'backbone.patch_embed.projection.bias',
        'cls_token': 'backbone.cls_token',
        'pos_embed': 'backbone.pos_embed',
    }
    names |= {
        f'blocks.{i}.{ours}.{kind}': f'backbone.layers.{i}.{theirs}.{kind}'
        for i in range(DEPTH)
        for ours, theirs in MMPRETRAIN.items()
        for kind in ('weight', 'bias')
    }
    return {names[key]: value for key, value in timm_state_dict().items()}


def model(**options):
    return VisionTransformer(dict(embed_dims=DIMS, depth=DEPTH, num_heads=2, mlp_ratio=4), img_size=48, **options)


def assert_equal(converted, expected):
    assert converted.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.items())


@pytest.mark.parametrize('style', [timm_state_dict, mmpretrain_state_dict])
def test_every_key_is_converted(style):
    upstream = style()
    conversion = convert(upstream, FAMILY)
    assert_equal(conversion.state_dict, {k: v for k, v in timm_state_dict().items() if not k.startswith('head.')})
    assert conversion.taken.keys() | conversion.dropped.keys() == upstream.keys()
    assert all(key.startswith('head.') for key in conversion.dropped) and len(conversion.dropped) == 2
    assert model().load_state_dict(conversion.state_dict) == ([], [])


def test_the_two_styles_give_the_same_maps():
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    maps = []
    for style in (timm_state_dict, mmpretrain_state_dict):
        vit = model().eval()
        vit.load_state_dict(convert_state_dict(style(), FAMILY))
        with torch.inference_mode():
            maps.append(vit(image)[0])
    assert torch.equal(*maps)


def test_converted_state_dict_is_unchanged():
    own = model(use_rel_pos=True, with_cls_token=False, window_size=2, qkv_bias=False).state_dict()
    assert_equal(convert_state_dict(own, FAMILY), own)
    detector = {f'backbone.{key}': value for key, value in own.items()} | {'neck.weight': torch.zeros(1)}
    conversion = convert({'state_dict': detector}, FAMILY)
    assert_equal(conversion.state_dict, own)
    assert conversion.dropped == {'neck.weight': 'outside the backbone'}


def test_keys_of_the_pretraining_are_dropped():
    upstream = timm_state_dict()
    extra = (
        'mask_token',
        'decoder_pos_embed',
        'decoder_embed.weight',
        'decoder_blocks.0.norm1.weight',
        'decoder_pred.bias',
        'fc_norm.weight',
        'pre_logits.fc.weight',
    )
    conversion = convert(upstream | dict.fromkeys(extra, torch.zeros(1)), FAMILY)
    assert conversion.dropped.keys() == {*extra, 'head.weight', 'head.bias'}
    assert 'pre-training' in conversion.dropped['mask_token'] and 'mean' in conversion.dropped['fc_norm.weight']


def test_vitdets_position_without_a_class_token_is_removed():
    upstream = {k: v for k, v in timm_state_dict().items() if not k.startswith(('cls_token', 'norm.', 'head.'))}
    converted = convert_state_dict(upstream, FAMILY)
    assert torch.equal(converted['pos_embed'], upstream['pos_embed'][:, 1:])
    assert model(with_cls_token=False, final_norm=False).load_state_dict(converted) == ([], [])


def test_class_token_without_a_position_gets_zeros():
    upstream = timm_state_dict()
    upstream['pos_embed'] = upstream['pos_embed'][:, 1:]
    positions = convert_state_dict(upstream, FAMILY)['pos_embed']
    assert torch.equal(positions[:, 1:], upstream['pos_embed']) and not positions[:, 0].any()


@pytest.mark.parametrize('with_cls_token', [True, False])
def test_positions_that_fit_are_kept(with_cls_token):
    upstream = timm_state_dict()
    for rows in (16, 12):  # a square and a non-square grid
        upstream['pos_embed'] = torch.rand(1, rows + with_cls_token, DIMS)
        if not with_cls_token:
            upstream.pop('cls_token', None)
        assert torch.equal(convert_state_dict(upstream, FAMILY)['pos_embed'], upstream['pos_embed'])


def test_prefix_of_vitdets_detectors(tmp_path):
    """ViTDet's detectors store the ViT under ``backbone.net``; the error asks for the prefix."""
    vit = {k: v for k, v in timm_state_dict().items() if not k.startswith(('head.', 'cls_token'))}
    detector = {f'backbone.net.{key}': value for key, value in vit.items()} | {'backbone.simfp_2.0.bias': torch.ones(1)}
    with pytest.raises(ValueError, match='another prefix, specify it'):
        convert(detector, FAMILY)
    torch.save({'model': detector}, tmp_path / 'vitdet.pth')
    backbone = model(
        with_cls_token=False,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vitdet.pth'), prefix='backbone.net'),
    )
    backbone.init_weights()
    assert torch.equal(backbone.pos_embed, vit['pos_embed'][:, 1:])


@pytest.mark.parametrize(
    'key', ['dist_token', 'reg_token', 'norm_pre.weight', 'blocks.0.ls1.gamma', 'blocks.1.attn.q_norm.weight']
)
def test_variants_with_another_architecture_are_refused(key):
    with pytest.raises(ValueError, match=rf"missing keys \[\], unexpected keys \['{key}'\]"):
        convert(timm_state_dict() | {key: torch.ones(1)}, FAMILY)


@pytest.mark.parametrize(
    'key', ['pos_embed', 'patch_embed.proj.bias', 'blocks.1.attn.qkv.bias', 'norm.bias', 'blocks.2.mlp.fc2.weight']
)
def test_missing_keys_are_named(key):
    upstream = timm_state_dict()
    del upstream[key]
    with pytest.raises(ValueError, match=rf"missing keys \['{key}'\]"):
        convert(upstream, FAMILY)


def test_state_dict_of_another_model_is_refused():
    with pytest.raises(
        ValueError, match=r"expected keys of timm .* or of mmpretrain .* got \['block1.0.norm1.weight'\]"
    ):
        convert({'block1.0.norm1.weight': torch.ones(1)}, FAMILY)
    with pytest.raises(ValueError, match=r'pos_embed has shape \(9, 8\); expected \(1, rows, C\)'):
        convert(timm_state_dict() | {'pos_embed': torch.ones(9, 8)}, FAMILY)

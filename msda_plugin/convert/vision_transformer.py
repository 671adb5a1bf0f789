"""Vision Transformer checkpoints of timm, of MAE and ViTDet, which use timm's names, and of mmpretrain.

msda_plugin uses timm's names. Classification layers and the decoder of MAE's pre-training are dropped. Variants with
another architecture (layer scale, distillation or register tokens, a norm before the blocks, gated feed-forward layers)
are refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msda_plugin.convert.conversion import PARAMETERS, Conversion, check_keys, count, rename

FAMILY = 'vision_transformer'

_CLASSIFIER = 'classification layer, not part of a backbone'
_MEAN_NORM = 'norm of the mean over all patches, for classification, not part of a backbone'
_DECODER = 'decoder of the pre-training, not part of a backbone'


@dataclass(frozen=True)
class Style:
    """Names of a ViT's modules in a code base.

    Attributes:
        blocks: name of the list of blocks.
        block: upstream module -> msda_plugin's, inside a block.
        rest: upstream module -> msda_plugin's, outside the blocks.
        dropped: start of a key -> reason why it is dropped.
    """

    blocks: str
    block: dict[str, str]
    rest: dict[str, str]
    dropped: dict[str, str]

    def matches(self, key: str) -> bool:
        """Whether the key belongs to a block's first norm, whose name differs between styles."""
        return re.match(rf'{self.blocks}\.\d+\.{next(iter(self.block))}\.', key) is not None


STYLES = (
    Style(
        'blocks',
        {name: name for name in ('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')},
        {'patch_embed.proj': 'patch_embed.proj', 'norm': 'norm'},
        {
            'head.': _CLASSIFIER,
            'pre_logits.': _CLASSIFIER,
            'fc_norm.': _MEAN_NORM,
            'decoder_': _DECODER,
            'mask_token': _DECODER,
        },
    ),
    Style(
        'layers',
        {
            'ln1': 'norm1',
            'attn.qkv': 'attn.qkv',
            'attn.proj': 'attn.proj',
            'ln2': 'norm2',
            'ffn.layers.0.0': 'mlp.fc1',
            'ffn.layers.1': 'mlp.fc2',
        },
        {'patch_embed.projection': 'patch_embed.proj', 'ln1': 'norm'},
        {'head.': _CLASSIFIER, 'ln2.': _MEAN_NORM, 'mask_token': _DECODER},
    ),
)
_REL_POS = ('attn.rel_pos_h', 'attn.rel_pos_w')


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; style, depth and options follow from the keys.

    If there are keys with the prefix ``backbone.``, all others are dropped. The first row of the converted
    ``pos_embed`` (1, rows, C) belongs to the class token, if there is one: a row without a token (ViTDet's checkpoints)
    is removed, and a token without a row gets a row of zeros.

    Raises:
        ValueError: If the keys are not those of a complete ViT, or ``pos_embed`` has another shape.
    """
    conversion = Conversion()
    prefix = 'backbone.' if any(key.startswith('backbone.') for key in state_dict) else ''
    names = {key: key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    style = next((style for style in STYLES if any(map(style.matches, names.values()))), None)
    if style is None:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: expected keys of timm ("blocks.0.norm1.weight") or of '
            f'mmpretrain ("layers.0.ln1.weight"), possibly after "backbone."; got {list(state_dict)[:8]}. If they have '
            'another prefix, specify it'
        )
    for key in state_dict:
        reason = 'outside the backbone'
        if key in names:
            reason = next((why for start, why in style.dropped.items() if names[key].startswith(start)), None)
        if reason is not None:
            conversion.dropped[key] = reason
    body = {key: name for key, name in names.items() if key not in conversion.dropped}
    table = _rename_table(set(body.values()), style)
    check_keys(FAMILY, set(body.values()), set(table))
    for key, name in body.items():
        value = state_dict[key]
        if name == 'pos_embed':
            value = _fit_class_row(value, 'cls_token' in table)
        conversion.take(key, table[name], value)
    return conversion


def _rename_table(keys: set[str], style: Style) -> dict[str, str]:
    """Upstream key -> msda_plugin's key, for a complete model of the depth and options that ``keys`` imply."""
    # Either all blocks have these, or none.
    bias = any(key.endswith('.attn.qkv.bias') for key in keys)
    rel_pos = any(key.endswith(_REL_POS) for key in keys)
    table = {'pos_embed': 'pos_embed'}
    if 'cls_token' in keys:
        table['cls_token'] = 'cls_token'
    for upstream, ours in style.rest.items():
        # ViTDet's models, and classifiers of the mean over the patches, have no final norm.
        if ours != 'norm' or any(key.startswith(f'{upstream}.') for key in keys):
            table |= rename(upstream, ours)
    for i in range(count(keys, rf'{style.blocks}\.(\d+)\.')):
        for upstream, ours in style.block.items():
            names = PARAMETERS if bias or ours != 'attn.qkv' else ['weight']
            table |= rename(f'{style.blocks}.{i}.{upstream}', f'blocks.{i}.{ours}', names)
        if rel_pos:
            table |= rename(f'{style.blocks}.{i}', f'blocks.{i}', _REL_POS)
    return table


def _fit_class_row(positions: Tensor, has_cls_token: bool) -> Tensor:
    """Add or remove the class token's row, so that it exists if and only if there is a class token."""
    if positions.dim() != 3 or positions.shape[0] != 1 or positions.shape[1] < 1:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: pos_embed has shape '
            f'{tuple(positions.shape)}; expected (1, rows, C)'
        )
    rows = positions.shape[1]
    # Numbers of rows that are neither n^2 nor n^2 + 1 belong to a non-square grid and are kept.
    is_square, is_square_and_one = (math.isqrt(n) ** 2 == n for n in (rows, rows - 1))
    if has_cls_token and is_square and not is_square_and_one:
        return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if not has_cls_token and is_square_and_one and not is_square:
        return positions[:, 1:]
    return positions

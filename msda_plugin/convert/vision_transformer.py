"""Vision Transformer: checkpoints of timm (and of MAE and ViTDet, which name alike) and of mmpretrain to ours.

Our names are timm's. Classifiers, and the decoder of MAE's pre-training, are dropped. Variants that compute something
else (layer scale, distillation or register tokens, a norm before the blocks, gated feed-forward layers) are refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .conversion import Conversion, check_keys, count

FAMILY = 'vision_transformer'

_CLASSIFIER = 'the classifier; a backbone has none'
_MEAN_NORM = 'normalises the mean over all patches, for the classifier; a backbone has none'
_DECODER = 'the decoder of the pre-training; a backbone has none'


@dataclass(frozen=True)
class Style:
    """How a code base names a ViT.

    Attributes:
        blocks: name of the list of blocks.
        block: upstream module -> ours, inside a block.
        rest: upstream module -> ours, outside the blocks.
        dropped: start of a key -> why it is dropped.
    """

    blocks: str
    block: dict[str, str]
    rest: dict[str, str]
    dropped: dict[str, str]

    def matches(self, key: str) -> bool:
        """Whether the key is of a block's first norm, whose name no two styles share."""
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
    """Rename every key; style, depth and options are read off the keys.

    Where there are keys under ``backbone.``, the ViT is there, and what lies outside is dropped. ``pos_embed``
    (1, rows, C) is made to have a row for the class token, the first one, exactly where the file has a class token: a
    row without a token (ViTDet's files) is left out, and a token without a row gets one of zeros.

    Raises:
        ValueError: if the keys are not those of a whole ViT, or the positions are no table of them.
    """
    conversion = Conversion()
    prefix = 'backbone.' if any(key.startswith('backbone.') for key in state_dict) else ''
    names = {key: key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    style = next((style for style in STYLES if any(map(style.matches, names.values()))), None)
    if style is None:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: expected keys of timm, "blocks.0.norm1.'
            'weight", or of mmpretrain, "layers.0.ln1.weight", both also under "backbone."; got '
            f'{list(state_dict)[:8]}; give their prefix if they lie under another one'
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
    """Upstream key -> our key, for the whole model that these keys are a part of."""
    # These are options of a whole model: it has them in every block, or in none.
    bias = any(key.endswith('.attn.qkv.bias') for key in keys)
    rel_pos = any(key.endswith(_REL_POS) for key in keys)
    table = {'pos_embed': 'pos_embed'}
    if 'cls_token' in keys:
        table['cls_token'] = 'cls_token'

    def add(upstream: str, ours: str, names: tuple[str, ...] = ('weight', 'bias')) -> None:
        table.update({f'{upstream}.{name}': f'{ours}.{name}' for name in names})

    for upstream, ours in style.rest.items():
        # A model that is read out by the mean of its patches has no norm at the end, nor has ViTDet's.
        if ours != 'norm' or any(key.startswith(f'{upstream}.') for key in keys):
            add(upstream, ours)
    for i in range(count(keys, rf'{style.blocks}\.(\d+)\.')):
        for upstream, ours in style.block.items():
            names = ('weight', 'bias') if bias or ours != 'attn.qkv' else ('weight',)
            add(f'{style.blocks}.{i}.{upstream}', f'blocks.{i}.{ours}', names)
        if rel_pos:
            table.update({f'{style.blocks}.{i}.{name}': f'blocks.{i}.{name}' for name in _REL_POS})
    return table


def _fit_class_row(positions: Tensor, has_cls_token: bool) -> Tensor:
    """Give or take the class token's row, so that there is one exactly where there is a class token."""
    if positions.dim() != 3 or positions.shape[0] != 1 or positions.shape[1] < 1:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: pos_embed has shape '
            f'{tuple(positions.shape)}; expected (1, rows, C)'
        )
    rows = positions.shape[1]
    # A number of rows that is neither a square nor one more is of an oblong grid, and taken to be as it should.
    is_square, is_square_and_one = (math.isqrt(n) ** 2 == n for n in (rows, rows - 1))
    if has_cls_token and is_square and not is_square_and_one:
        return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if not has_cls_token and is_square_and_one and not is_square:
        return positions[:, 1:]
    return positions

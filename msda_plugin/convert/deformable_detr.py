"""Checkpoints of Deformable DETR's authors: base, box refinement or two-stage, single-scale or multi-scale.

They fit a neck ``ChannelMapper`` with ``bias=True`` and a group norm. A classifier of 91 rows, indexed by COCO's
category ids, becomes one of 80.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from msda_plugin.convert.coco import COCO_IDS, NUM_COCO_IDS
from msda_plugin.convert.conversion import IN_PROJ, Conversion, check_keys, count, rename

FAMILY = 'deformable_detr'

_DEFORMABLE = ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')
_FFN = {'linear1': 'ffn.layers.0.0', 'linear2': 'ffn.layers.1'}
# Upstream module -> msda_plugin's, inside a layer. msda_plugin numbers the norms in the order of execution.
_ENCODER_LAYER = {
    **{f'self_attn.{name}': f'self_attn.{name}' for name in _DEFORMABLE},
    'norm1': 'norms.0',
    'norm2': 'norms.1',
    **_FFN,
}
_DECODER_LAYER = {
    **{f'cross_attn.{name}': f'cross_attn.{name}' for name in _DEFORMABLE},
    'self_attn.out_proj': 'self_attn.attn.out_proj',
    'norm2': 'norms.0',
    'norm1': 'norms.1',
    'norm3': 'norms.2',
    **_FFN,
}
_TWO_STAGE = {
    'enc_output': 'memory_trans_fc',
    'enc_output_norm': 'memory_trans_norm',
    'pos_trans': 'pos_trans_fc',
    'pos_trans_norm': 'pos_trans_norm',
}

_BACKBONE = 'backbone.0.body.'
_REPEATS = ('transformer.decoder.bbox_embed.', 'transformer.decoder.class_embed.')


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model follow from the keys.

    Raises:
        ValueError: If the keys are not those of a complete Deformable DETR, or 91 classes cannot be reduced to 80.
    """
    if any(key.startswith('bbox_head.cls_branches.') for key in state_dict):
        return Conversion.unchanged(state_dict)
    if any('.multihead_attn.' in key for key in state_dict):
        raise ValueError(
            f'the state dict belongs to DETR (its decoder has multihead_attn), but family {FAMILY!r} needs deformable '
            "attention; use family 'detr'"
        )
    conversion, table = Conversion(), _rename_table(state_dict)
    body = {key for key in state_dict if not key.startswith((_BACKBONE, *_REPEATS))}
    check_keys(FAMILY, body, set(table))
    for key, value in state_dict.items():
        if key.startswith(_BACKBONE):
            conversion.take(key, 'backbone.' + key[len(_BACKBONE) :], value)
        elif key.startswith(_REPEATS):
            conversion.dropped[key] = 'duplicate of the module of this name at the top level'
        elif key.startswith('class_embed.') and len(value) == NUM_COCO_IDS:
            conversion.take(key, table[key], value[_class_rows(key, state_dict)])
        else:
            conversion.take(key, table[key], value)
    return conversion


def _class_rows(key: str, state_dict: Mapping[str, Tensor]) -> list[int]:
    """The 80 of the 91 rows of this classifier to keep."""
    if 'transformer.enc_output.weight' not in state_dict:
        return COCO_IDS
    if not any(key.startswith(_REPEATS[0]) for key in state_dict):
        raise ValueError(
            'the state dict has 91 classes and two stages without box refinement: a single classifier scores objects '
            'by COCO id and proposals by row 0, which 80 rows cannot do. Use a two-stage checkpoint with box refinement'
        )
    # The last classifier scores the encoder's proposals with row 0, which is not a category id.
    is_proposal = int(key.split('.')[1]) == count(state_dict, r'class_embed\.(\d+)\.') - 1
    return [0, *COCO_IDS[1:]] if is_proposal else COCO_IDS


def _rename_table(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Upstream key -> msda_plugin's key, for a complete model of these sizes without its backbone."""
    table = {'transformer.level_embed': 'level_embed'}
    for part, modules in (('encoder', _ENCODER_LAYER), ('decoder', _DECODER_LAYER)):
        for i in range(max(1, count(state_dict, rf'transformer\.{part}\.layers\.(\d+)\.'))):
            upstream_layer, layer = f'transformer.{part}.layers.{i}', f'{part}.layers.{i}'
            for upstream, ours in modules.items():
                table |= rename(f'{upstream_layer}.{upstream}', f'{layer}.{ours}')
            if part == 'decoder':
                table |= rename(f'{upstream_layer}.self_attn', f'{layer}.self_attn.attn', IN_PROJ)
    if any(key.startswith('transformer.enc_output') for key in state_dict):
        for upstream, ours in _TWO_STAGE.items():
            table |= rename(f'transformer.{upstream}', ours)
    else:
        table |= rename('transformer.reference_points', 'reference_points_fc')
        table |= rename('query_embed', 'query_embedding', ['weight'])

    # 1x1 convolutions project the backbone's maps; 3x3 convolutions compute the extra, coarser levels.
    num_projected = 0
    for i in range(max(1, count(state_dict, r'input_proj\.(\d+)\.'))):
        kernel = state_dict.get(f'input_proj.{i}.0.weight', torch.empty(0, 0, 1, 1)).shape[-1]
        num_projected += kernel == 1
        ours = f'neck.convs.{i}' if kernel == 1 else f'neck.extra_convs.{i - num_projected}'
        table |= rename(f'input_proj.{i}.0', f'{ours}.conv')
        table |= rename(f'input_proj.{i}.1', f'{ours}.gn')

    for i in range(max(1, count(state_dict, r'class_embed\.(\d+)\.'), count(state_dict, r'bbox_embed\.(\d+)\.'))):
        table |= rename(f'class_embed.{i}', f'bbox_head.cls_branches.{i}')
        for j in range(3):
            table |= rename(f'bbox_embed.{i}.layers.{j}', f'bbox_head.reg_branches.{i}.{2 * j}')
    return table

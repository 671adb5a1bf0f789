"""Deformable DETR: the authors' checkpoints (base, box refinement, two-stage; one scale or several) to our detector's.

The neck they fit is a ``ChannelMapper`` whose convolutions have a bias (``bias=True``) and a group norm. A classifier
of 91 rows is indexed by COCO's category ids and becomes one of 80.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .coco import COCO_IDS, NUM_COCO_IDS
from .conversion import Conversion, check_keys, count

FAMILY = 'deformable_detr'

_PARAMETERS = ('weight', 'bias')
_DEFORMABLE = ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')
_FFN = {'linear1': 'ffn.layers.0.0', 'linear2': 'ffn.layers.1'}
# Upstream module -> ours, inside a layer. Ours numbers the norms in the order in which they run.
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
    """Rename every key; the sizes of the model are read off the keys.

    Raises:
        ValueError: if the keys are not those of a whole Deformable DETR, or 91 classes cannot become 80.
    """
    conversion = Conversion()
    if any(key.startswith('bbox_head.cls_branches.') for key in state_dict):
        for key, value in state_dict.items():
            conversion.take(key, key, value)
        return conversion
    if any('.multihead_attn.' in key for key in state_dict):
        raise ValueError(
            f'the state dict is of plain DETR, whose decoder has multihead_attn: family {FAMILY!r} needs '
            "deformable attention; use family 'detr'"
        )
    table = _rename_table(state_dict)
    body = {key for key in state_dict if not key.startswith((_BACKBONE, *_REPEATS))}
    check_keys(FAMILY, body, set(table))
    for key, value in state_dict.items():
        if key.startswith(_BACKBONE):
            conversion.take(key, 'backbone.' + key[len(_BACKBONE) :], value)
        elif key.startswith(_REPEATS):
            conversion.dropped[key] = 'repeats the module of the same name at the top level'
        elif key.startswith('class_embed.') and len(value) == NUM_COCO_IDS:
            conversion.take(key, table[key], value[_class_rows(key, state_dict)])
        else:
            conversion.take(key, table[key], value)
    return conversion


def _class_rows(key: str, state_dict: Mapping[str, Tensor]) -> list[int]:
    """Which of the 91 rows of this classifier become our 80."""
    if 'transformer.enc_output.weight' not in state_dict:
        return COCO_IDS
    if not any(key.startswith(_REPEATS[0]) for key in state_dict):
        raise ValueError(
            'the state dict has 91 classes in two stages without box refinement: one classifier scores '
            'the objects by their COCO id and the proposals by row 0, and no 80 rows of it can do both. '
            'Use a two-stage file with box refinement, or reduce its classes before training'
        )
    # The last classifier scores the encoder's proposals, by row 0, which is no category's id.
    is_proposal = int(key.split('.')[1]) == count(state_dict, r'class_embed\.(\d+)\.') - 1
    return [0, *COCO_IDS[1:]] if is_proposal else COCO_IDS


def _rename_table(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Upstream key -> our key, for the whole model that these keys are a part of, but for its backbone."""
    table = {'transformer.level_embed': 'level_embed'}

    def add(upstream: str, ours: str, names: tuple[str, ...] = _PARAMETERS) -> None:
        table.update({f'{upstream}.{name}': f'{ours}.{name}' for name in names})

    for part, modules in (('encoder', _ENCODER_LAYER), ('decoder', _DECODER_LAYER)):
        for i in range(max(1, count(state_dict, rf'transformer\.{part}\.layers\.(\d+)\.'))):
            for upstream, ours in modules.items():
                add(f'transformer.{part}.layers.{i}.{upstream}', f'{part}.layers.{i}.{ours}')
            if part == 'decoder':
                add(
                    f'transformer.decoder.layers.{i}.self_attn',
                    f'decoder.layers.{i}.self_attn.attn',
                    ('in_proj_weight', 'in_proj_bias'),
                )
    if any(key.startswith('transformer.enc_output') for key in state_dict):
        for upstream, ours in _TWO_STAGE.items():
            add(f'transformer.{upstream}', ours)
    else:
        add('transformer.reference_points', 'reference_points_fc')
        add('query_embed', 'query_embedding', ('weight',))

    # Maps of the backbone are projected by 1x1 convolutions, the coarser levels made from the last by 3x3 ones.
    num_projected = 0
    for i in range(max(1, count(state_dict, r'input_proj\.(\d+)\.'))):
        kernel = state_dict.get(f'input_proj.{i}.0.weight', torch.empty(0, 0, 1, 1)).shape[-1]
        num_projected += kernel == 1
        ours = f'neck.convs.{i}' if kernel == 1 else f'neck.extra_convs.{i - num_projected}'
        add(f'input_proj.{i}.0', f'{ours}.conv')
        add(f'input_proj.{i}.1', f'{ours}.gn')

    for i in range(max(1, count(state_dict, r'class_embed\.(\d+)\.'), count(state_dict, r'bbox_embed\.(\d+)\.'))):
        add(f'class_embed.{i}', f'bbox_head.cls_branches.{i}')
        for j in range(3):
            add(f'bbox_embed.{i}.layers.{j}', f'bbox_head.reg_branches.{i}.{2 * j}')
    return table

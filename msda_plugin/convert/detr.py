"""DETR: the authors' checkpoints (facebookresearch/detr) to our detector's.

The neck they fit is a ``ChannelMapper`` of one 1x1 convolution without a norm. A classifier of 92 rows, COCO's category
ids and one for no object, becomes one of 81.
"""

from collections.abc import Mapping

from torch import Tensor

from .coco import COCO_IDS, NUM_COCO_IDS
from .conversion import Conversion, check_keys, count

FAMILY = 'detr'

_PARAMETERS = ('weight', 'bias')
_FFN = {'linear1': 'ffn.layers.0.0', 'linear2': 'ffn.layers.1'}
# Upstream module -> ours, inside a layer.
_ATTENTIONS = {
    'encoder': {'self_attn': 'self_attn.attn'},
    'decoder': {'self_attn': 'self_attn.attn', 'multihead_attn': 'cross_attn.attn'},
}
_NORMS = {'encoder': 2, 'decoder': 3}
_TOP = {
    'transformer.decoder.norm': 'decoder.post_norm',
    'input_proj': 'neck.convs.0.conv',
    'class_embed': 'bbox_head.fc_cls',
    'bbox_embed.layers.0': 'bbox_head.reg_ffn.layers.0.0',
    'bbox_embed.layers.1': 'bbox_head.reg_ffn.layers.1',
    'bbox_embed.layers.2': 'bbox_head.fc_reg',
}
_BACKBONE = 'backbone.0.body.'


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model are read off the keys.

    Raises:
        ValueError: if the keys are not those of a whole DETR for detection, with norms after its blocks.
    """
    conversion = Conversion()
    if 'bbox_head.fc_cls.weight' in state_dict:
        for key, value in state_dict.items():
            conversion.take(key, key, value)
        return conversion
    if any('.sampling_offsets.' in key for key in state_dict):
        raise ValueError(
            f'the state dict is of Deformable DETR, whose attention has sampling_offsets: family '
            f"{FAMILY!r} has none; use family 'deformable_detr'"
        )
    if any(key.startswith('transformer.encoder.norm.') for key in state_dict):
        raise ValueError(
            'the state dict is of a DETR with norms before its blocks (--pre_norm), for which there is no '
            'detector; use one with norms after them, as all published ones have'
        )
    table = _rename_table(state_dict)
    check_keys(FAMILY, {key for key in state_dict if not key.startswith(_BACKBONE)}, set(table))
    for key, value in state_dict.items():
        if key.startswith(_BACKBONE):
            conversion.take(key, 'backbone.' + key[len(_BACKBONE) :], value)
        elif key.startswith('class_embed.') and len(value) == NUM_COCO_IDS + 1:
            # The last row is that of no object.
            conversion.take(key, table[key], value[[*COCO_IDS, NUM_COCO_IDS]])
        else:
            conversion.take(key, table[key], value)
    return conversion


def _rename_table(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Upstream key -> our key, for the whole model that these keys are a part of, but for its backbone."""
    table = {'query_embed.weight': 'query_embedding.weight'}

    def add(upstream: str, ours: str, names: tuple[str, ...] = _PARAMETERS) -> None:
        table.update({f'{upstream}.{name}': f'{ours}.{name}' for name in names})

    for upstream, ours in _TOP.items():
        add(upstream, ours)
    for part, attentions in _ATTENTIONS.items():
        for i in range(max(1, count(state_dict, rf'transformer\.{part}\.layers\.(\d+)\.'))):
            theirs, ours = f'transformer.{part}.layers.{i}', f'{part}.layers.{i}'
            for upstream, name in attentions.items():
                add(f'{theirs}.{upstream}', f'{ours}.{name}', ('in_proj_weight', 'in_proj_bias'))
                add(f'{theirs}.{upstream}.out_proj', f'{ours}.{name}.out_proj')
            for upstream, name in _FFN.items():
                add(f'{theirs}.{upstream}', f'{ours}.{name}')
            for j in range(_NORMS[part]):
                add(f'{theirs}.norm{j + 1}', f'{ours}.norms.{j}')
    return table

"""Checkpoints of DETR's authors (facebookresearch/detr).

They fit a neck ``ChannelMapper`` with one 1x1 convolution and no norm. A classifier of 92 rows, for COCO's category ids
and no object, becomes one of 81.
"""

from collections.abc import Mapping

from torch import Tensor

from msda_plugin.convert.coco import COCO_IDS, NUM_COCO_IDS
from msda_plugin.convert.conversion import IN_PROJ, Conversion, check_keys, count, rename

FAMILY = 'detr'

_FFN = {'linear1': 'ffn.layers.0.0', 'linear2': 'ffn.layers.1'}
# Upstream module -> msda_plugin's, inside a layer.
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
    """Rename every key; the sizes of the model follow from the keys.

    Raises:
        ValueError: If the keys are not those of a complete, post-norm DETR for detection.
    """
    if 'bbox_head.fc_cls.weight' in state_dict:
        return Conversion.unchanged(state_dict)
    if any('.sampling_offsets.' in key for key in state_dict):
        raise ValueError(
            f'the state dict belongs to Deformable DETR (its attention has sampling_offsets), not to family '
            f"{FAMILY!r}; use family 'deformable_detr'"
        )
    if any(key.startswith('transformer.encoder.norm.') for key in state_dict):
        raise ValueError(
            'the state dict belongs to a pre-norm DETR (--pre_norm), which is not supported; use a post-norm '
            'checkpoint, such as all published ones'
        )
    conversion, table = Conversion(), _rename_table(state_dict)
    check_keys(FAMILY, {key for key in state_dict if not key.startswith(_BACKBONE)}, set(table))
    for key, value in state_dict.items():
        if key.startswith(_BACKBONE):
            conversion.take(key, 'backbone.' + key[len(_BACKBONE) :], value)
        elif key.startswith('class_embed.') and len(value) == NUM_COCO_IDS + 1:
            # The last row stands for no object.
            conversion.take(key, table[key], value[[*COCO_IDS, NUM_COCO_IDS]])
        else:
            conversion.take(key, table[key], value)
    return conversion


def _rename_table(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Upstream key -> msda_plugin's key, for a complete model of these sizes without its backbone."""
    table = {'query_embed.weight': 'query_embedding.weight'}
    for upstream, ours in _TOP.items():
        table |= rename(upstream, ours)
    for part, attentions in _ATTENTIONS.items():
        for i in range(max(1, count(state_dict, rf'transformer\.{part}\.layers\.(\d+)\.'))):
            upstream_layer, layer = f'transformer.{part}.layers.{i}', f'{part}.layers.{i}'
            for upstream, ours in attentions.items():
                table |= rename(f'{upstream_layer}.{upstream}', f'{layer}.{ours}', IN_PROJ)
                table |= rename(f'{upstream_layer}.{upstream}.out_proj', f'{layer}.{ours}.out_proj')
            for upstream, ours in _FFN.items():
                table |= rename(f'{upstream_layer}.{upstream}', f'{layer}.{ours}')
            for j in range(_NORMS[part]):
                table |= rename(f'{upstream_layer}.norm{j + 1}', f'{layer}.norms.{j}')
    return table

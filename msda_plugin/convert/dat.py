"""DAT (CVPR 2022): the authors' checkpoints to ours: classifiers, detection backbones, and single attention layers.

The classifier and the buffers are dropped. A classifier has no norms for the maps that a detector takes; it is given
fresh ones (weight 1, bias 0).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .conversion import Conversion, check_keys

FAMILY = 'dat'

# Upstream -> ours, inside one layer of deformable attention (which has one of the last four, or none), of window
# attention, and of the feed-forward layer. 1x1 convolutions are linear layers here.
_LINEAR = {'proj_q': 'query', 'proj_k': 'key', 'proj_v': 'value', 'proj_out': 'proj'}
_DEFORMABLE = {
    'conv_offset.0.weight': 'offset_conv.weight',
    'conv_offset.0.bias': 'offset_conv.bias',
    'conv_offset.1.norm.weight': 'offset_norm.weight',
    'conv_offset.1.norm.bias': 'offset_norm.bias',
    'conv_offset.3.weight': 'offset_proj.weight',
    **{f'{upstream}.{name}': f'{ours}.{name}' for upstream, ours in _LINEAR.items() for name in ('weight', 'bias')},
}
_POSITIONAL = (
    {'rpe_table': 'position_bias.table'},
    {'rpe_table.weight': 'position_conv.weight', 'rpe_table.bias': 'position_conv.bias'},
    {
        'rpe_table.0.weight': 'position_bias.mlp.0.weight',
        'rpe_table.0.bias': 'position_bias.mlp.0.bias',
        'rpe_table.2.weight': 'position_bias.mlp.2.weight',
    },
)
_WINDOW = {
    'relative_position_bias_table': 'w_msa.relative_position_bias_table',
    'proj_qkv.weight': 'w_msa.qkv.weight',
    'proj_qkv.bias': 'w_msa.qkv.bias',
    'proj_out.weight': 'w_msa.proj.weight',
    'proj_out.bias': 'w_msa.proj.bias',
}
_FEED_FORWARD = {
    'linear1.weight': '0.weight',
    'linear1.bias': '0.bias',
    'linear2.weight': '3.weight',
    'linear2.bias': '3.bias',
}
_WEIGHT_AND_BIAS = {'weight': 'weight', 'bias': 'bias'}
# End of a key -> why it is dropped.
_DROPPED = {
    'cls_norm.norm.weight': 'the classifier; a backbone has none',
    'cls_norm.norm.bias': 'the classifier; a backbone has none',
    'cls_head.weight': 'the classifier; a backbone has none',
    'cls_head.bias': 'the classifier; a backbone has none',
    'relative_position_index': 'follows from the window size',
    'attn_mask': 'follows from the sizes of the map and the window',
}


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model are read off the keys.

    Raises:
        ValueError: if the keys are not those of a whole DAT in its CVPR 2022 form, or of a whole attention layer.
    """
    conversion = Conversion()
    if 'stages.0.patch_embed.proj.weight' in state_dict or 'offset_conv.weight' in state_dict:
        for key, value in state_dict.items():
            conversion.take(key, key, value)
        return conversion
    for key in state_dict:
        reason = next((why for end, why in _DROPPED.items() if f'.{key}'.endswith(f'.{end}')), None)
        if reason is not None:
            conversion.dropped[key] = reason
    body = state_dict.keys() - conversion.dropped.keys()
    is_layer = 'conv_offset.0.weight' in body
    table = _deformable_names(body, '') if is_layer else _model_table(body)
    check_keys(FAMILY, body, set(table))
    for key, value in state_dict.items():
        if key in table:
            is_linear = re.search(r'(proj_[qkv]|proj_out|conv_offset\.3)\.weight$', key)
            conversion.take(key, table[key], value.flatten(1) if is_linear else value)
    if not is_layer:
        _add_norms(conversion.state_dict)
    return conversion


def _model_table(keys: set[str]) -> dict[str, str]:
    """Upstream key -> our key, for the whole model that these keys are a part of."""
    depths: dict[int, int] = {}
    for key in keys:
        if match := re.match(r'stages\.(\d+)\.attns\.(\d+)\.', key):
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if not depths:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: expected keys such as '
            f'"stages.0.attns.0.proj_qkv.weight"; got {sorted(keys)[:8]}; give their prefix if they lie '
            'under another one'
        )
    table: dict[str, str] = {}

    def add(upstream: str, ours: str, names: Mapping[str, str] = _WEIGHT_AND_BIAS) -> None:
        table.update({f'{upstream}.{name}': f'{ours}.{new_name}' for name, new_name in names.items()})

    for stage in range(max(depths) + 1):
        ours = f'stages.{stage}'
        embed = 'patch_proj' if stage == 0 else f'down_projs.{stage - 1}'
        add(f'{embed}.0', f'{ours}.patch_embed.proj', _WEIGHT_AND_BIAS if stage == 0 else {'weight': 'weight'})
        add(f'{embed}.1.norm', f'{ours}.patch_embed.norm')
        for block in range(depths.get(stage, 1)):
            add(f'{ours}.layer_norms.{2 * block}.norm', f'{ours}.blocks.{block}.norm1')
            add(f'{ours}.layer_norms.{2 * block + 1}.norm', f'{ours}.blocks.{block}.norm2')
            add(f'{ours}.mlps.{block}.chunk', f'{ours}.blocks.{block}.mlp', _FEED_FORWARD)
            attention = f'{ours}.attns.{block}'
            if f'{attention}.conv_offset.0.weight' in keys:
                add(attention, f'{ours}.blocks.{block}.attn', _deformable_names(keys, f'{attention}.'))
            else:
                add(attention, f'{ours}.blocks.{block}.attn', _WINDOW)
        # Only a detector has them, and only for the maps that it takes.
        if f'norms.{stage}.norm.weight' in keys:
            add(f'norms.{stage}.norm', f'norms.{stage}')
    return table


def _deformable_names(keys: set[str], prefix: str) -> dict[str, str]:
    """Upstream name -> our name, inside the deformable attention whose upstream keys have this prefix."""
    positional = next((names for names in _POSITIONAL if any(prefix + name in keys for name in names)), {})
    return _DEFORMABLE | positional


def _add_norms(state_dict: dict[str, Tensor]) -> None:
    """Add fresh norms for the maps that have none."""
    for key in [key for key in state_dict if key.endswith('patch_embed.norm.weight')]:
        stage = key.split('.')[1]
        state_dict.setdefault(f'norms.{stage}.weight', torch.ones_like(state_dict[key]))
        state_dict.setdefault(f'norms.{stage}.bias', torch.zeros_like(state_dict[key]))

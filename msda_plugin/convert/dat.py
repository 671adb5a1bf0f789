"""Checkpoints of DAT's authors (CVPR 2022): classifiers, detection backbones and single attention layers.

The classification layer and the buffers are dropped. Classifiers have no norms for the output maps; new ones (weight
1, bias 0) are added.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from msda_plugin.convert.conversion import PARAMETERS, Conversion, check_keys, count, rename

FAMILY = 'dat'

# Upstream name -> msda_plugin's, inside a layer of deformable attention (with at most one of _POSITIONAL), of window
# attention and of the feed-forward layer. Upstream's 1x1 convolutions are linear layers here.
_LINEAR = {'proj_q': 'query', 'proj_k': 'key', 'proj_v': 'value', 'proj_out': 'proj'}
_DEFORMABLE = {
    **rename('conv_offset.0', 'offset_conv'),
    **rename('conv_offset.1.norm', 'offset_norm'),
    'conv_offset.3.weight': 'offset_proj.weight',
    **{key: new_key for names in _LINEAR.items() for key, new_key in rename(*names).items()},
}
_POSITIONAL = (
    {'rpe_table': 'position_bias.table'},
    rename('rpe_table', 'position_conv'),
    {**rename('rpe_table.0', 'position_bias.mlp.0'), 'rpe_table.2.weight': 'position_bias.mlp.2.weight'},
)
_WINDOW = {
    'relative_position_bias_table': 'w_msa.relative_position_bias_table',
    **rename('proj_qkv', 'w_msa.qkv'),
    **rename('proj_out', 'w_msa.proj'),
}
_FEED_FORWARD = rename('linear1', '0') | rename('linear2', '3')
_CLASSIFIER = 'classification layer, not part of a backbone'
# End of a key -> reason why it is dropped.
_DROPPED = {
    'cls_norm.norm.weight': _CLASSIFIER,
    'cls_norm.norm.bias': _CLASSIFIER,
    'cls_head.weight': _CLASSIFIER,
    'cls_head.bias': _CLASSIFIER,
    'relative_position_index': 'computed from the window size',
    'attn_mask': 'computed from the sizes of the map and the window',
}


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model follow from the keys.

    Raises:
        ValueError: If the keys are not those of a complete DAT (CVPR 2022) or of a complete attention layer.
    """
    if 'stages.0.patch_embed.proj.weight' in state_dict or 'offset_conv.weight' in state_dict:
        return Conversion.unchanged(state_dict)
    conversion = Conversion()
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
    """Upstream key -> msda_plugin's key, for a complete model of the sizes that ``keys`` imply."""
    num_stages = count(keys, r'stages\.(\d+)\.attns\.\d+\.')
    if not num_stages:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: expected keys such as '
            f'"stages.0.attns.0.proj_qkv.weight"; got {sorted(keys)[:8]}. If they have a prefix, specify it'
        )
    table: dict[str, str] = {}
    for stage in range(num_stages):
        prefix = f'stages.{stage}'
        embed = 'patch_proj' if stage == 0 else f'down_projs.{stage - 1}'
        table |= rename(f'{embed}.0', f'{prefix}.patch_embed.proj', PARAMETERS if stage == 0 else ['weight'])
        table |= rename(f'{embed}.1.norm', f'{prefix}.patch_embed.norm')
        for i in range(max(1, count(keys, rf'stages\.{stage}\.attns\.(\d+)\.'))):
            attention, block = f'{prefix}.attns.{i}', f'{prefix}.blocks.{i}'
            is_deformable = f'{attention}.conv_offset.0.weight' in keys
            table |= rename(f'{prefix}.layer_norms.{2 * i}.norm', f'{block}.norm1')
            table |= rename(f'{prefix}.layer_norms.{2 * i + 1}.norm', f'{block}.norm2')
            table |= rename(f'{prefix}.mlps.{i}.chunk', f'{block}.mlp', _FEED_FORWARD)
            table |= rename(
                attention, f'{block}.attn', _deformable_names(keys, f'{attention}.') if is_deformable else _WINDOW
            )
        # Only detectors have norms, for the maps that they use.
        if f'norms.{stage}.norm.weight' in keys:
            table |= rename(f'norms.{stage}.norm', f'norms.{stage}')
    return table


def _deformable_names(keys: set[str], prefix: str) -> dict[str, str]:
    """Upstream name -> msda_plugin's name, inside the deformable attention whose upstream keys have this prefix."""
    positional = next((names for names in _POSITIONAL if any(prefix + name in keys for name in names)), {})
    return _DEFORMABLE | positional


def _add_norms(state_dict: dict[str, Tensor]) -> None:
    """Add norms with weight 1 and bias 0 for the maps that have none."""
    for key in [key for key in state_dict if key.endswith('patch_embed.norm.weight')]:
        stage = key.split('.')[1]
        state_dict.setdefault(f'norms.{stage}.weight', torch.ones_like(state_dict[key]))
        state_dict.setdefault(f'norms.{stage}.bias', torch.zeros_like(state_dict[key]))

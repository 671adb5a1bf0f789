"""Checkpoints of Shunted Transformer's authors. The classification layer ``head`` is dropped."""

import re
from collections.abc import Mapping

from torch import Tensor

from msda_plugin.convert.conversion import PARAMETERS, Conversion, check_keys, count, rename

FAMILY = 'shunted_transformer'

# Upstream module -> msda_plugin's, inside a block.
_REDUCED_ATTENTION = {
    'attn.q': 'attn.query',
    **{
        f'attn.{upstream}{i + 1}': f'attn.branches.{i}.{ours}'
        for i in (0, 1)
        for upstream, ours in (('sr', 'reduction'), ('norm', 'norm'), ('kv', 'kv'), ('local_conv', 'local_enhancement'))
    },
}
_PLAIN_ATTENTION = {'attn.q': 'attn.query', 'attn.kv': 'attn.kv', 'attn.local_conv': 'attn.local_enhancement'}
_REST_OF_BLOCK = {
    'attn.proj': 'attn.proj',
    'norm1': 'norm1',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.dwconv.dwconv': 'mlp.dwconv',
    'mlp.fc2': 'mlp.fc2',
}
_BATCH_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_QKV = ('attn.q', 'attn.kv', 'attn.kv1', 'attn.kv2')


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model follow from the keys.

    Raises:
        ValueError: If the keys are not those of a complete Shunted Transformer.
    """
    if any(key.startswith('stages.') for key in state_dict):
        return Conversion.unchanged(state_dict)
    conversion, renamed = Conversion(), _rename_table(state_dict)
    body = {key for key in state_dict if not key.startswith('head.')}
    check_keys(FAMILY, body, set(renamed))
    for key, value in state_dict.items():
        if key in renamed:
            conversion.take(key, renamed[key], value)
        else:
            conversion.dropped[key] = 'classification layer, not part of a backbone'
    return conversion


def _rename_table(keys: Mapping[str, Tensor]) -> dict[str, str]:
    """Upstream key -> msda_plugin's key, for a complete model of the sizes that ``keys`` imply."""
    # A model without qkv biases has none in any block.
    qkv_bias = any(key.endswith('.attn.q.bias') for key in keys)
    table: dict[str, str] = {}
    # The stem repeats (conv, norm, ReLU) and ends with a convolution; upstream numbers them consecutively.
    num_convs = max(3, count(keys, r'patch_embed1\.conv\.(\d+)\.') - 1) // 3
    for i in range(num_convs):
        table |= rename(f'patch_embed1.conv.{3 * i}', f'stages.0.patch_embed.convs.{i}.conv', ['weight'])
        table |= rename(f'patch_embed1.conv.{3 * i + 1}', f'stages.0.patch_embed.convs.{i}.norm', _BATCH_NORM)
    table |= rename(f'patch_embed1.conv.{3 * num_convs}', 'stages.0.patch_embed.proj')
    num_stages = max(1, count(keys, r'block(\d+)\.\d+\.')) - 1
    for stage in range(1, (num_stages or 4) + 1):
        prefix = f'stages.{stage - 1}'
        if stage > 1:
            table |= rename(f'patch_embed{stage}.proj', f'{prefix}.patch_embed.proj')
        table |= rename(f'patch_embed{stage}.norm', f'{prefix}.patch_embed.norm')
        table |= rename(f'norm{stage}', f'{prefix}.norm')
        reduced = any(re.match(rf'block{stage}\.\d+\.attn\.sr[12]\.', key) for key in keys)
        modules = (_REDUCED_ATTENTION if reduced else _PLAIN_ATTENTION) | _REST_OF_BLOCK
        for i in range(max(1, count(keys, rf'block{stage}\.(\d+)\.'))):
            for upstream, ours in modules.items():
                names = PARAMETERS if qkv_bias or upstream not in _QKV else ['weight']
                table |= rename(f'block{stage}.{i}.{upstream}', f'{prefix}.blocks.{i}.{ours}', names)
    return table

"""Shunted Transformer: the authors' checkpoints to ours. The classifier ``head`` is dropped."""

import re
from collections.abc import Mapping

from torch import Tensor

from .conversion import Conversion, check_keys

FAMILY = 'shunted_transformer'

# Upstream module -> ours, inside a block.
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
    """Rename every key; the sizes of the model are read off the keys.

    Raises:
        ValueError: if the keys are not those of a whole Shunted Transformer.
    """
    conversion = Conversion()
    if any(key.startswith('stages.') for key in state_dict):
        for key, value in state_dict.items():
            conversion.take(key, key, value)
        return conversion
    renamed = _rename_table(state_dict)
    body = {key for key in state_dict if not key.startswith('head.')}
    check_keys(FAMILY, body, set(renamed))
    for key, value in state_dict.items():
        if key in renamed:
            conversion.take(key, renamed[key], value)
        else:
            conversion.dropped[key] = 'the classifier; a backbone has none'
    return conversion


def _rename_table(keys: Mapping[str, Tensor]) -> dict[str, str]:
    """Upstream key -> our key, for the whole model that these keys are a part of."""
    depths: dict[int, int] = {}
    last_stem_conv = 3
    for key in keys:
        if match := re.match(r'block(\d+)\.(\d+)\.', key):
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
        elif match := re.match(r'patch_embed1\.conv\.(\d+)\.', key):
            last_stem_conv = max(last_stem_conv, int(match.group(1)))
    # A model built without qkv biases has none in any block.
    qkv_bias = any(key.endswith('.attn.q.bias') for key in keys)
    table: dict[str, str] = {}

    def add(upstream: str, ours: str, names: tuple[str, ...] = ('weight', 'bias')) -> None:
        table.update({f'{upstream}.{name}': f'{ours}.{name}' for name in names})

    # The stem is (conv, norm, ReLU) repeated, and a last convolution that upstream numbers along with them.
    last_stem_conv -= last_stem_conv % 3
    for i in range(last_stem_conv // 3):
        add(f'patch_embed1.conv.{3 * i}', f'stages.0.patch_embed.convs.{i}.conv', ('weight',))
        add(f'patch_embed1.conv.{3 * i + 1}', f'stages.0.patch_embed.convs.{i}.norm', _BATCH_NORM)
    add(f'patch_embed1.conv.{last_stem_conv}', 'stages.0.patch_embed.proj')
    for stage in range(1, max(depths, default=4) + 1):
        ours = f'stages.{stage - 1}'
        if stage > 1:
            add(f'patch_embed{stage}.proj', f'{ours}.patch_embed.proj')
        add(f'patch_embed{stage}.norm', f'{ours}.patch_embed.norm')
        add(f'norm{stage}', f'{ours}.norm')
        reduced = any(re.match(rf'block{stage}\.\d+\.attn\.sr[12]\.', key) for key in keys)
        modules = (_REDUCED_ATTENTION if reduced else _PLAIN_ATTENTION) | _REST_OF_BLOCK
        for block in range(depths.get(stage, 1)):
            for upstream, name in modules.items():
                add(
                    f'block{stage}.{block}.{upstream}',
                    f'{ours}.blocks.{block}.{name}',
                    ('weight', 'bias') if qkv_bias or upstream not in _QKV else ('weight',),
                )
    return table

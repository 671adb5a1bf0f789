"""Checkpoints of RT-DETR and RT-DETRv2: of the authors (PyTorch), and of Hugging Face transformers.

The result fits :class:`msda_plugin.RTDETR` with ``ResNetVD``, ``HybridEncoder`` and ``RTDETRHead``. Of the authors'
training checkpoints, the averaged weights are taken.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msda_plugin.convert.conversion import Conversion

FAMILY = 'rtdetr'

Rules = Sequence[tuple[str, str]]  # regular expression that matches a whole key -> its replacement

_NORM = r'(weight|bias|running_mean|running_var|num_batches_tracked)'
_QKV = re.compile(r'(.*)\.([qkv])_proj\.(weight|bias)')

# The neck's keys behind a prefix: `encoder.` of the authors, `model.encoder.` of transformers.
_FUSION_RULES: Rules = [
    (r'(lateral_convs|fpn_blocks|downsample_convs|pan_blocks)\.(.+)\.conv\.(weight)', r'\1.\2.conv.\3'),
    (r'(lateral_convs|fpn_blocks|downsample_convs|pan_blocks)\.(.+)\.norm\.' + _NORM, r'\1.\2.bn.\3'),
]
AUTHORS_NECK_RULES: Rules = [
    (r'input_proj\.(\d+)\.(?:0|conv)\.weight', r'input_proj.\1.conv.weight'),
    (r'input_proj\.(\d+)\.(?:1|norm)\.' + _NORM, r'input_proj.\1.bn.\2'),
    (r'encoder\.(\d+)\.layers\.(\d+)\.self_attn\.(.+)', r'encoder.\1.\2.self_attn.attn.\3'),
    (r'encoder\.(\d+)\.layers\.(\d+)\.linear1\.(.+)', r'encoder.\1.\2.ffn.layers.0.0.\3'),
    (r'encoder\.(\d+)\.layers\.(\d+)\.linear2\.(.+)', r'encoder.\1.\2.ffn.layers.1.\3'),
    (r'encoder\.(\d+)\.layers\.(\d+)\.norm1\.(.+)', r'encoder.\1.\2.norms.0.\3'),
    (r'encoder\.(\d+)\.layers\.(\d+)\.norm2\.(.+)', r'encoder.\1.\2.norms.1.\3'),
    # D-FINE halves maps by two convolutions.
    (r'downsample_convs\.(\d+)\.0\.cv1\.conv\.(weight)', r'downsample_convs.\1.0.conv.\2'),
    (r'downsample_convs\.(\d+)\.0\.cv1\.norm\.' + _NORM, r'downsample_convs.\1.0.bn.\2'),
    (r'downsample_convs\.(\d+)\.0\.cv2\.conv\.(weight)', r'downsample_convs.\1.1.conv.\2'),
    (r'downsample_convs\.(\d+)\.0\.cv2\.norm\.' + _NORM, r'downsample_convs.\1.1.bn.\2'),
    *_FUSION_RULES,
]
# Published files have older names (encoder.N, out_proj, fc1) than the models of transformers 5.
_LAYER = r'(?:aifi|encoder)\.(\d+)\.layers\.(\d+)\.'
TRANSFORMERS_NECK_RULES: Rules = [
    (_LAYER + r'self_attn\.in_proj_(weight|bias)', r'encoder.\1.\2.self_attn.attn.in_proj_\3'),
    (_LAYER + r'self_attn\.(?:o_proj|out_proj)\.(.+)', r'encoder.\1.\2.self_attn.attn.out_proj.\3'),
    (_LAYER + r'self_attn_layer_norm\.(.+)', r'encoder.\1.\2.norms.0.\3'),
    (_LAYER + r'final_layer_norm\.(.+)', r'encoder.\1.\2.norms.1.\3'),
    (_LAYER + r'(?:fc1|mlp\.fc1|mlp\.layers\.0)\.(weight|bias)', r'encoder.\1.\2.ffn.layers.0.0.\3'),
    (_LAYER + r'(?:fc2|mlp\.fc2|mlp\.layers\.1)\.(weight|bias)', r'encoder.\1.\2.ffn.layers.1.\3'),
    # D-FINE halves maps by two convolutions, and names the parts of its blocks differently.
    (r'downsample_convs\.(\d+)\.conv1\.conv\.(weight)', r'downsample_convs.\1.0.conv.\2'),
    (r'downsample_convs\.(\d+)\.conv1\.norm\.' + _NORM, r'downsample_convs.\1.0.bn.\2'),
    (r'downsample_convs\.(\d+)\.conv2\.conv\.(weight)', r'downsample_convs.\1.1.conv.\2'),
    (r'downsample_convs\.(\d+)\.conv2\.norm\.' + _NORM, r'downsample_convs.\1.1.bn.\2'),
    (r'((?:fpn|pan)_blocks\.\d+)\.csp_rep1\.(.+)\.conv\.(weight)', r'\1.cv2.0.\2.conv.\3'),
    (r'((?:fpn|pan)_blocks\.\d+)\.csp_rep1\.(.+)\.norm\.' + _NORM, r'\1.cv2.0.\2.bn.\3'),
    (r'((?:fpn|pan)_blocks\.\d+)\.csp_rep2\.(.+)\.conv\.(weight)', r'\1.cv3.0.\2.conv.\3'),
    (r'((?:fpn|pan)_blocks\.\d+)\.csp_rep2\.(.+)\.norm\.' + _NORM, r'\1.cv3.0.\2.bn.\3'),
    *_FUSION_RULES,
]
_DFINE_BLOCK = re.compile(r'((?:fpn|pan)_blocks\.\d+)\.(conv[1-4])\.(conv|norm)\.(.+)')
DFINE_FUSION_NAMES = {'conv1': 'cv1', 'conv2': 'cv2.1', 'conv3': 'cv3.1', 'conv4': 'cv4'}


def apply_rules(key: str, rules: Rules) -> str | None:
    """The new name of a key by the first rule that matches all of it; None if there is none."""
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return None


def neck_key(key: str, *, transformers: bool, dfine: bool) -> str | None:
    """The key of :class:`HybridEncoder` for a key of the upstream encoder without its prefix; None: unknown.

    transformers' input projections (``model.encoder_input_proj``) are outside its encoder; they get the authors' name,
    ``input_proj``, first.
    """
    if transformers and key.startswith('input_proj.'):
        return apply_rules(key, AUTHORS_NECK_RULES)
    if transformers and dfine and (match := _DFINE_BLOCK.fullmatch(key)):
        block, name, part, rest = match.groups()
        return f'{block}.{DFINE_FUSION_NAMES[name]}.{"bn" if part == "norm" else part}.{rest}'
    return apply_rules(key, TRANSFORMERS_NECK_RULES if transformers else AUTHORS_NECK_RULES)


def join_attention_projections(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Join ``q_proj``, ``k_proj`` and ``v_proj`` to the ``in_proj_weight`` and ``in_proj_bias`` of torch's attention.

    Returns:
        The state dict, and the keys that each of its entries was made of.

    Raises:
        ValueError: If one of the three is missing.
    """
    joined, sources, parts = {}, {}, {}
    for key, value in state_dict.items():
        if match := _QKV.fullmatch(key):
            module, name, kind = match.groups()
            parts.setdefault(f'{module}.in_proj_{kind}', {})[name] = key
        else:
            joined[key], sources[key] = value, [key]
    for new, found in parts.items():
        if missing := sorted(set('qkv') - set(found)):
            raise ValueError(f'the state dict has {sorted(found.values())}, but no {missing} projections beside them')
        joined[new] = torch.cat([state_dict[found[name]] for name in 'qkv'])
        sources[new] = [found[name] for name in 'qkv']
    return joined, sources


def convert_neck(state_dict: Mapping[str, Tensor], *, transformers: bool, dfine: bool = False) -> Conversion:
    """Convert the encoder alone, without its prefix, for :class:`HybridEncoder`.

    Raises:
        ValueError: If a key is unknown.
    """
    conversion = Conversion()
    joined, sources = join_attention_projections(state_dict)
    for key, value in joined.items():
        new_key = neck_key(key, transformers=transformers, dfine=dfine)
        if new_key is None:
            raise ValueError(f'the state dict has the key {key!r}, which a hybrid encoder does not have')
        for source in sources[key]:
            conversion.take(source, new_key, value)
    return conversion

"""Checkpoints of RT-DETR and RT-DETRv2: of the authors (PyTorch), and of Hugging Face transformers.

The result fits ``msda_plugin.RTDETR`` with ``ResNetVD``, ``HybridEncoder`` and ``RTDETRHead``. Of the authors' training
checkpoints, the averaged weights are taken. The authors' files of a backbone alone fit ``ResNetVD``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from msda_plugin.convert.conversion import Conversion, count

FAMILY = 'rtdetr'

Rules = Sequence[tuple[str, str]]  # regular expression that matches a whole key -> its replacement

_NORM = r'(weight|bias|running_mean|running_var|num_batches_tracked)'
_DEFORMABLE = r'((?:sampling_offsets|attention_weights|value_proj|output_proj)\.(?:weight|bias))'
_DROPPED = [
    (r'decoder\.(anchors|valid_mask)|encoder\.pos_embed\d+', 'computed from the size of the image'),
    (r'.*\.(num_points_scale|n_points_scale)', 'follows from the number of points'),
    (r'(class_embed|bbox_embed)\..*', 'duplicate of the module of this name in model.decoder'),
]
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


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model follow from the keys.

    Raises:
        ValueError: If a key is not one of RT-DETR's, or a part of it is missing.
    """
    if any(key.startswith(('bbox_head.cls_branches.', 'layer1.')) for key in state_dict):  # a detector, a backbone
        return Conversion.unchanged(state_dict)
    if any(key.startswith('res_layers.') for key in state_dict):
        return _rename_all(state_dict, {key: [key] for key in state_dict}, _stem_and_stages)
    transformers = any(key.startswith('model.') for key in state_dict)
    prefix = r'model\.decoder\.class_embed\.(\d+)\.' if transformers else r'decoder\.dec_score_head\.(\d+)\.'
    num_layers = count(state_dict, prefix)
    if not num_layers:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: it has no key that matches {prefix}; found '
            f'{list(state_dict)[:8]}'
        )
    joined, sources = join_attention_projections(state_dict)
    key_of = _transformers_key if transformers else _authors_key
    conversion = _rename_all(joined, sources, lambda key: key_of(key, num_layers))
    _check_parts(conversion.state_dict, num_layers)
    return conversion


def _rename_all(
    state_dict: Mapping[str, Tensor], sources: Mapping[str, list[str]], key_of: Callable[[str], str | None]
) -> Conversion:
    conversion, unexpected = Conversion(), []
    for key, value in state_dict.items():
        reason = next((reason for pattern, reason in _DROPPED if re.fullmatch(pattern, key)), None)
        if reason:
            conversion.dropped[key] = reason
            continue
        new_key = key_of(key)
        if new_key is None:
            unexpected += sources[key]
            continue
        for source in sources[key]:
            conversion.take(source, new_key, value)
    if unexpected:
        raise ValueError(f'the state dict does not fit family {FAMILY!r}: unexpected keys {sorted(unexpected)}')
    return conversion


def _check_parts(converted: Mapping[str, Tensor], num_layers: int) -> None:
    """Raise ValueError if a part of the detector, or a parameter of one of several equal layers, is missing."""
    parts = [
        'backbone.stem',
        'neck.input_proj',
        'neck.pan_blocks',
        'input_proj',
        'memory_trans_fc',
        'memory_trans_norm',
    ]
    parts += [f'decoder.layers.{i}' for i in range(num_layers)] + ['decoder.ref_point_head']
    parts += [f'bbox_head.{kind}_branches.{i}' for kind in ('cls', 'reg') for i in range(num_layers + 1)]
    missing = [f'{part}.*' for part in parts if not any(key.startswith(f'{part}.') for key in converted)]
    for pattern in (
        r'decoder\.layers\.(\d+)\.',
        r'bbox_head\.cls_branches\.(\d+)\.',
        r'bbox_head\.reg_branches\.(\d+)\.',
    ):
        layers = {}
        for key in converted:
            if match := re.match(pattern, key):
                layers.setdefault(match.group(), set()).add(key[match.end() :])
        complete = set().union(*layers.values())
        missing += [prefix + name for prefix, names in layers.items() for name in sorted(complete - names)]
    if missing:
        raise ValueError(f'the state dict does not fit family {FAMILY!r}: missing keys, by their new names, {missing}')


def _stem_and_stages(key: str) -> str | None:
    """The key of ``ResNetVD`` for a key of the authors' backbone."""
    if match := re.fullmatch(r'conv1\.conv1_([123])\.(conv|norm)\.' + _NORM, key):
        index, part, name = match.groups()
        return f'stem.{3 * int(index) - 3 + (part == "norm")}.{name}'
    if match := re.fullmatch(r'res_layers\.(\d)\.blocks\.(\d+)\.branch2([abc])\.(conv|norm)\.' + _NORM, key):
        stage, block, branch, part, name = match.groups()
        return f'layer{int(stage) + 1}.{block}.{"bn" if part == "norm" else part}{"abc".index(branch) + 1}.{name}'
    if match := re.fullmatch(r'res_layers\.(\d)\.blocks\.(\d+)\.short\.(?:conv\.)?(conv|norm)\.' + _NORM, key):
        stage, block, part, name = match.groups()
        return f'layer{int(stage) + 1}.{block}.downsample.{1 + (part == "norm")}.{name}'
    return None


def _authors_key(key: str, num_layers: int) -> str | None:
    module, _, rest = key.partition('.')
    if module == 'backbone':
        new = _stem_and_stages(rest)
        return new and f'backbone.{new}'
    if module == 'encoder':
        new = neck_key(rest, transformers=False, dfine=False)
        return new and f'neck.{new}'
    return module == 'decoder' and apply_rules(rest, _authors_decoder_rules(num_layers)) or None


def _transformers_key(key: str, num_layers: int) -> str | None:
    rest = key.removeprefix('model.')
    if match := re.fullmatch(r'backbone\.model\.embedder\.embedder\.(\d)\.(convolution|normalization)\.' + _NORM, rest):
        index, part, name = match.groups()
        return f'backbone.stem.{3 * int(index) + (part == "normalization")}.{name}'
    stage = r'backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.'
    if match := re.fullmatch(stage + r'layer\.(\d)\.(convolution|normalization)\.' + _NORM, rest):
        index, block, branch, part, name = match.groups()
        part = 'bn' if part == 'normalization' else 'conv'
        return f'backbone.layer{int(index) + 1}.{block}.{part}{int(branch) + 1}.{name}'
    if match := re.fullmatch(stage + r'shortcut\.(?:1\.)?(convolution|normalization)\.' + _NORM, rest):
        index, block, part, name = match.groups()
        return f'backbone.layer{int(index) + 1}.{block}.downsample.{1 + (part == "normalization")}.{name}'
    if rest.startswith('encoder_input_proj.'):
        new = neck_key(rest.removeprefix('encoder_'), transformers=True, dfine=False)
        return new and f'neck.{new}'
    if rest.startswith('encoder.'):
        new = neck_key(rest.removeprefix('encoder.'), transformers=True, dfine=False)
        return new and f'neck.{new}'
    return apply_rules(rest, _transformers_decoder_rules(num_layers))


def _branch_rules(score: str, box: str, index: tuple[int | str, int]) -> Rules:
    """Class and box branches; ``index``: the new number of the branch, and the group of the parameter's name."""
    return [
        (score + r'\.(weight|bias)', rf'bbox_head.cls_branches.{index[0]}.\{index[1]}'),
        *[
            (box + rf'\.layers\.{j}\.(weight|bias)', rf'bbox_head.reg_branches.{index[0]}.{2 * j}.\{index[1]}')
            for j in range(3)
        ],
    ]


@cache
def _authors_decoder_rules(num_layers: int) -> Rules:
    """Keys behind ``decoder.``."""
    layer = r'decoder\.layers\.(\d+)\.'
    return [
        (r'input_proj\.(\d+)\.(?:0|conv)\.weight', r'input_proj.\1.conv.weight'),
        (r'input_proj\.(\d+)\.(?:1|norm)\.' + _NORM, r'input_proj.\1.bn.\2'),
        (layer + r'self_attn\.(.+)', r'decoder.layers.\1.self_attn.attn.\2'),
        (layer + r'cross_attn\.' + _DEFORMABLE, r'decoder.layers.\1.cross_attn.\2'),
        (layer + r'linear1\.(weight|bias)', r'decoder.layers.\1.ffn.layers.0.0.\2'),
        (layer + r'linear2\.(weight|bias)', r'decoder.layers.\1.ffn.layers.1.\2'),
        *[(layer + rf'norm{j + 1}\.(weight|bias)', rf'decoder.layers.\1.norms.{j}.\2') for j in range(3)],
        (r'query_pos_head\.layers\.([01])\.(weight|bias)', r'decoder.ref_point_head.layers.\1.\2'),
        (r'denoising_class_embed\.(weight)', r'bbox_head.denoising.label_embedding.\1'),
        (r'tgt_embed\.(weight)', r'query_embedding.\1'),
        (r'enc_output\.(?:0|proj)\.(weight|bias)', r'memory_trans_fc.\1'),
        (r'enc_output\.(?:1|norm)\.(weight|bias)', r'memory_trans_norm.\1'),
        *_branch_rules('enc_score_head', 'enc_bbox_head', (num_layers, 1)),
        *_branch_rules(r'dec_score_head\.(\d+)', r'dec_bbox_head\.(\d+)', (r'\1', 2)),
    ]


@cache
def _transformers_decoder_rules(num_layers: int) -> Rules:
    """Keys behind ``model.``."""
    layer = r'decoder\.layers\.(\d+)\.'
    return [
        (r'decoder_input_proj\.(\d+)\.0\.weight', r'input_proj.\1.conv.weight'),
        (r'decoder_input_proj\.(\d+)\.1\.' + _NORM, r'input_proj.\1.bn.\2'),
        (layer + r'self_attn\.in_proj_(weight|bias)', r'decoder.layers.\1.self_attn.attn.in_proj_\2'),
        (layer + r'self_attn\.(?:o_proj|out_proj)\.(weight|bias)', r'decoder.layers.\1.self_attn.attn.out_proj.\2'),
        (layer + r'encoder_attn\.' + _DEFORMABLE, r'decoder.layers.\1.cross_attn.\2'),
        (layer + r'(?:mlp\.)?fc1\.(weight|bias)', r'decoder.layers.\1.ffn.layers.0.0.\2'),
        (layer + r'(?:mlp\.)?fc2\.(weight|bias)', r'decoder.layers.\1.ffn.layers.1.\2'),
        (layer + r'self_attn_layer_norm\.(weight|bias)', r'decoder.layers.\1.norms.0.\2'),
        (layer + r'encoder_attn_layer_norm\.(weight|bias)', r'decoder.layers.\1.norms.1.\2'),
        (layer + r'final_layer_norm\.(weight|bias)', r'decoder.layers.\1.norms.2.\2'),
        (r'decoder\.query_pos_head\.layers\.([01])\.(weight|bias)', r'decoder.ref_point_head.layers.\1.\2'),
        (r'denoising_class_embed\.(weight)', r'bbox_head.denoising.label_embedding.\1'),
        (r'weight_embedding\.(weight)', r'query_embedding.\1'),
        (r'enc_output\.0\.(weight|bias)', r'memory_trans_fc.\1'),
        (r'enc_output\.1\.(weight|bias)', r'memory_trans_norm.\1'),
        *_branch_rules('enc_score_head', 'enc_bbox_head', (num_layers, 1)),
        *_branch_rules(r'decoder\.class_embed\.(\d+)', r'decoder\.bbox_embed\.(\d+)', (r'\1', 2)),
    ]

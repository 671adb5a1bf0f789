"""Checkpoints of D-FINE and DEIM: of the authors, and of Hugging Face transformers (``DFineForObjectDetection``).

The result fits :class:`msda_plugin.detectors.DFINE` with ``HGNetV2``, ``HybridEncoder`` and ``DFINEHead``; the weights
of a backbone alone fit ``HGNetV2``. Of the authors' training checkpoints, the averaged weights are taken.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from msda_plugin.convert.conversion import Conversion, count
from msda_plugin.convert.rtdetr import Rules, apply_rules, join_attention_projections, neck_key

FAMILY = 'dfine'

_PARAMETER = r'(weight|bias)'
_LINEAR = r'\.layers\.(\d+)\.' + _PARAMETER
_NORM = r'(weight|bias|running_mean|running_var|num_batches_tracked)'
_DROPPED = {
    r'(?:.*\.)?num_points_scale': 'follows from the number of points',
    r'(?:decoder|model)\.(?:anchors|valid_mask)|encoder\.pos_embed\d+': 'computed from the size of the images',
    r'decoder\.decoder\.(?:up|reg_scale)': 'duplicate of decoder.up and decoder.reg_scale',
    r'(?:class_embed|bbox_embed)\..+': 'duplicate of the module of this name in model.decoder',
}
_BACKBONE_KEY = r'(?:stem|stages\.\d+)\..+'

# Authors: decoder.*, decoder.decoder.*; transformers: model.*, model.decoder.*. Published files of transformers have
# older names (fc1, out_proj) than the models of transformers 5.
_PARTS = r'(?:decoder|model)\.'
_LAYER = r'(?:decoder|model)\.decoder\.layers\.(\d+)\.'
# N stands for the number of decoder layers.
_RULES: Rules = [
    (r'backbone\.(' + _BACKBONE_KEY + ')', r'backbone.\1'),
    (_PARTS + r'(?:decoder_)?input_proj\.(\d+)\.(?:conv|0)\.weight', r'input_proj.\1.conv.weight'),
    (_PARTS + r'(?:decoder_)?input_proj\.(\d+)\.(?:norm|1)\.' + _NORM, r'input_proj.\1.bn.\2'),
    (_PARTS + r'enc_output\.(?:proj|0)\.' + _PARAMETER, r'memory_trans_fc.\1'),
    (_PARTS + r'enc_output\.(?:norm|1)\.' + _PARAMETER, r'memory_trans_norm.\1'),
    (_PARTS + r'enc_score_head\.' + _PARAMETER, r'bbox_head.cls_branches.N.\1'),
    (_PARTS + r'enc_bbox_head' + _LINEAR, r'bbox_head.reg_branches.N.2*\1.\2'),
    (_PARTS + r'(?:dec_score_head|decoder\.class_embed)\.(\d+)\.' + _PARAMETER, r'bbox_head.cls_branches.\1.\2'),
    (_PARTS + r'(?:dec_bbox_head|decoder\.bbox_embed)\.(\d+)' + _LINEAR, r'bbox_head.reg_branches.\1.2*\2.\3'),
    (_PARTS + r'(?:decoder\.)?pre_bbox_head' + _LINEAR, r'bbox_head.initial_branch.2*\1.\2'),
    (_PARTS + r'(?:decoder\.)?query_pos_head' + _LINEAR, r'decoder.query_pos_head.2*\1.\2'),
    (_PARTS + r'decoder\.lqe_layers\.(\d+)\.reg_conf' + _LINEAR, r'bbox_head.quality_branches.\1.2*\2.\3'),
    (_PARTS + r'denoising_class_embed\.weight', r'bbox_head.denoising.label_embedding.weight'),
    (_LAYER + r'(?:linear1|mlp\.layers\.0|fc1)\.' + _PARAMETER, r'decoder.layers.\1.ffn.0.\2'),
    (_LAYER + r'(?:linear2|mlp\.layers\.1|fc2)\.' + _PARAMETER, r'decoder.layers.\1.ffn.3.\2'),
    (_LAYER + r'(?:norm1|self_attn_layer_norm)\.' + _PARAMETER, r'decoder.layers.\1.norm1.\2'),
    (_LAYER + r'(?:norm3|final_layer_norm)\.' + _PARAMETER, r'decoder.layers.\1.norm2.\2'),
    (_LAYER + r'self_attn\.(?:out_proj|o_proj)\.' + _PARAMETER, r'decoder.layers.\1.self_attn.out_proj.\2'),
    (_LAYER + r'self_attn\.(in_proj_.+)', r'decoder.layers.\1.self_attn.\2'),
    (_LAYER + r'(?:cross_attn|encoder_attn)\.(.+)', r'decoder.layers.\1.cross_attn.\2'),
    (_LAYER + r'(gateway\..+)', r'decoder.layers.\1.\2'),
]
_TRANSFORMERS_BACKBONE = 'model.backbone.model.'


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key; the sizes of the model follow from the keys.

    Raises:
        ValueError: If a key is unknown, or a part of the detector is missing.
    """
    if any(key.startswith('bbox_head.') for key in state_dict):
        return Conversion.unchanged(state_dict)
    if any(key.startswith(('stem.', 'embedder.')) for key in state_dict):
        return _convert_backbone(state_dict)
    transformers = any(key.startswith('model.') for key in state_dict)
    conversion = Conversion()
    joined, sources = join_attention_projections(state_dict)
    decoder = 'model.decoder' if transformers else 'decoder.decoder'
    num_layers = count(joined, rf'{re.escape(decoder)}\.layers\.(\d+)\.')
    scales = [f'{"model.decoder" if transformers else "decoder"}.{name}' for name in ('up', 'reg_scale')]
    unknown = []
    for key, value in joined.items():
        if reason := next((why for pattern, why in _DROPPED.items() if re.fullmatch(pattern, key)), None):
            conversion.dropped[key] = reason
            continue
        if key in scales:
            continue
        new_key = _new_key(key, num_layers, transformers)
        if new_key is None:
            unknown.append(key)
            continue
        for source in sources[key]:
            conversion.take(source, new_key, value)
    missing = [key for key in scales if key not in joined]  # the distances of the bins follow from them
    missing += _missing_branches(conversion.state_dict, num_layers)
    if missing or unknown:
        raise ValueError(
            f'the state dict does not fit family {FAMILY!r}: missing keys {missing}, unexpected keys {sorted(unknown)}'
        )
    up, reg_scale = (joined[key].float().reshape(()) for key in scales)
    num_bins = conversion.state_dict['bbox_head.reg_branches.0.4.weight'].shape[0] // 4
    conversion.take(scales[1], 'bbox_head.reg_scale', reg_scale)
    conversion.take(scales[0], 'bbox_head.bin_values', bin_values(num_bins - 1, reg_scale, up))
    return conversion


def _missing_branches(converted: Mapping[str, Tensor], num_layers: int) -> list[str]:
    """Parts of a detector, by their new names, of which there is no key."""
    parts = ['backbone', 'neck', 'memory_trans_fc', 'memory_trans_norm', 'decoder.query_pos_head']
    parts += [f'bbox_head.{kind}_branches.{i}' for kind in ('cls', 'reg') for i in range(num_layers + 1)]
    parts += [f'bbox_head.quality_branches.{i}' for i in range(num_layers)] + ['bbox_head.initial_branch']
    return [f'{part}.*' for part in parts if not any(key.startswith(f'{part}.') for key in converted)]


def bin_values(reg_max: int, reg_scale: Tensor, up: Tensor) -> Tensor:
    """Distances that the bins stand for, (reg_max + 1,): symmetric, finer near 0 (D-FINE, equation 4)."""
    limit = (up * reg_scale).abs().double()
    steps = torch.arange(1, reg_max // 2, dtype=torch.float64, device=limit.device)
    right = torch.cat([(limit + 1) ** (2 / (reg_max - 2) * steps) - 1, 2 * limit[None]])
    return torch.cat([-right.flip(0), right.new_zeros(1), right]).float()


def _new_key(key: str, num_layers: int, transformers: bool) -> str | None:
    """The detector's key, or None if the key is unknown."""
    if transformers:
        if key.startswith(_TRANSFORMERS_BACKBONE):
            new_key = _backbone_key(key[len(_TRANSFORMERS_BACKBONE) :])
            return new_key and f'backbone.{new_key}'
        for prefix, inner in (('model.encoder_input_proj.', 'input_proj.'), ('model.encoder.', '')):
            if key.startswith(prefix):
                new_key = neck_key(inner + key[len(prefix) :], transformers=True, dfine=True)
                return new_key and f'neck.{new_key}'
    elif key.startswith('encoder.'):
        new_key = neck_key(key[len('encoder.') :], transformers=False, dfine=True)
        return new_key and f'neck.{new_key}'
    new_key = apply_rules(key, _RULES)
    if new_key is None:
        return None
    # The activations between the linear layers are numbered as well.
    new_key = re.sub(r'2\*(\d+)', lambda match: str(2 * int(match[1])), new_key)
    return new_key.replace('.N.', f'.{num_layers}.')


def _backbone_key(key: str) -> str | None:
    """The key of ``HGNetV2`` for one of transformers' or the authors' backbone; None: unknown."""
    key = re.sub(r'^embedder\.', 'stem.', re.sub(r'^encoder\.stages\.', 'stages.', key))
    key = key.replace('.convolution.', '.conv.').replace('.normalization.', '.bn.')
    return key if re.fullmatch(_BACKBONE_KEY, key) else None


def _convert_backbone(state_dict: Mapping[str, Tensor]) -> Conversion:
    conversion = Conversion()
    for key, value in state_dict.items():
        new_key = _backbone_key(key)
        if new_key is None:
            raise ValueError(f'the state dict does not fit family {FAMILY!r}: unexpected key {key!r}')
        conversion.take(key, new_key, value)
    return conversion

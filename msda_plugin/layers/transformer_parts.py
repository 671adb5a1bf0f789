"""What the transformers of DETR and Deformable DETR are built and run with."""

import copy

import torch
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msda_plugin.registry import MODELS


def build_or_default(cfg: dict, default: type[nn.Module]) -> nn.Module:
    """Build ``cfg`` by its ``type``, or as ``default`` where it names none. The config is left as it was."""
    return MODELS.build({'type': default, **copy.deepcopy(cfg)})


def build_ffn(cfg: dict) -> FFN:
    """mmcv's feed-forward network, whose ReLU does not work in place.

    A linear layer's output of three dimensions is a view, and changing a view in place costs three copies in the
    backward pass.
    """
    ffn = FFN(**cfg)
    for module in ffn.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return ffn


def skip_weights(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hook: do not form the (queries x queries) attention weights, which mmcv's layer throws away."""
    return args, kwargs | {'need_weights': False}


def build_attention(cfg: dict) -> nn.Module:
    """The attention that ``cfg`` names; without ``type`` mmcv's multi-head attention, which then forms no weights."""
    attention = build_or_default(cfg, MultiheadAttention)
    if type(attention) is MultiheadAttention:
        attention.attn.register_forward_pre_hook(skip_weights, with_kwargs=True)
    return attention


def run_layer(layer: nn.Module, recompute: bool, **inputs: Tensor | None) -> Tensor:
    """One layer; with ``recompute`` its activations are computed again in the backward pass instead of kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, use_reentrant=False, **inputs)
    return layer(**inputs)


def check_num_cp(num_cp: int, num_layers: int) -> None:
    """Raise ValueError unless ``num_cp`` layers can be checkpointed."""
    if num_cp > num_layers:
        raise ValueError(f'num_cp={num_cp} layers are to be checkpointed, but there are only num_layers={num_layers}')

"""Construction and checkpointing of the layers that the DETR and Deformable DETR transformers share."""

import copy

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from mmengine.model import ModuleList
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msda_plugin.registry import MODELS


def build_or_default(cfg: dict, default: type[nn.Module]) -> nn.Module:
    """Build a module from ``cfg``, of type ``default`` if ``cfg`` has no ``type``. ``cfg`` is not modified."""
    return MODELS.build({'type': default, **copy.deepcopy(cfg)})


def build_attention(cfg: dict, default: type[nn.Module] = MultiheadAttention) -> nn.Module:
    """Build an attention layer, of type ``default`` if ``cfg`` has no ``type``.

    mmcv's ``MultiheadAttention`` discards the (queries x keys) attention weights, so it is told not to compute them.
    """
    attention = build_or_default(cfg, default)
    if type(attention) is MultiheadAttention:
        attention.attn.register_forward_pre_hook(skip_weights, with_kwargs=True)
    return attention


def skip_weights(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: request no attention weights."""
    return args, kwargs | {'need_weights': False}


def build_ffn(cfg: dict) -> FFN:
    """Build mmcv's feed-forward network with out-of-place ReLUs.

    A linear layer's 3D output is a view, and modifying a view in place costs three copies in the backward pass.
    """
    ffn = FFN(**cfg)
    for module in ffn.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return ffn


def build_norms(cfg: dict, embed_dims: int, count: int) -> ModuleList:
    """Build ``count`` norm layers."""
    return ModuleList([build_norm_layer(cfg, embed_dims)[1] for _ in range(count)])


def run_layer(layer: nn.Module, recompute: bool, **inputs: Tensor | None) -> Tensor:
    """Run a layer. With ``recompute`` its activations are recomputed in the backward pass instead of stored."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, use_reentrant=False, **inputs)
    return layer(**inputs)


def check_num_cp(num_cp: int, num_layers: int) -> None:
    """Raise ValueError if ``num_cp`` exceeds ``num_layers``."""
    if num_cp > num_layers:
        raise ValueError(f'num_cp={num_cp} exceeds num_layers={num_layers}: set num_cp to at most {num_layers}')

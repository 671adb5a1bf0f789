"""Shunted Transformer: a four-stage backbone with shunted self-attention.

Source: Ren et al., "Shunted Self-Attention via Multi-Scale Token Aggregation", CVPR 2022,
https://arxiv.org/abs/2111.15193, with the details of the published code.
"""

import math
from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.backbones.published_backbone import (
    PublishedBackbone,
    check_frozen_stages,
    check_image,
    check_indices,
    choose_arch,
)
from msda_plugin.layers.detail_feed_forward import DetailFeedForward
from msda_plugin.layers.shunted_self_attention import ShuntedSelfAttention, check_attention_sizes
from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map
from msda_plugin.layers.transformer_parts import run_layer
from msda_plugin.registry import MODELS

# The published sizes, one value per stage. `stem_convs`: additional 3x3 convolutions in the stem.
ARCHS = {
    'tiny': dict(
        embed_dims=(64, 128, 256, 512),
        depths=(1, 2, 4, 1),
        num_heads=(2, 4, 8, 16),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        stem_convs=0,
    ),
    'small': dict(
        embed_dims=(64, 128, 256, 512),
        depths=(2, 4, 12, 1),
        num_heads=(2, 4, 8, 16),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        stem_convs=1,
    ),
    'base': dict(
        embed_dims=(64, 128, 256, 512),
        depths=(3, 4, 24, 2),
        num_heads=(2, 4, 8, 16),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        stem_convs=2,
    ),
}


class ShuntedBlock(BaseModule):
    """Pre-norm transformer block with shunted self-attention and the detail-specific feed-forward layer."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = ShuntedSelfAttention(embed_dims, num_heads, sr_ratio, qkv_bias, attn_drop_rate, drop_rate)
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = DetailFeedForward(embed_dims, int(embed_dims * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) of a map of ``hw_shape`` (H, W) -> tokens (B, H * W, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), hw_shape))
        return x + self.drop_path(self.mlp(self.norm2(x), hw_shape))


class ConvNormReLU(BaseModule):
    """Convolution without bias, BatchNorm and ReLU; in eval mode, the BatchNorm is folded into the convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) -> map (B, C_out, h, w)."""
        if self.norm.training:
            return F.relu_(self.norm(self.conv(x)))
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        shift = self.norm.bias - self.norm.running_mean * scale
        return F.relu_(
            F.conv2d(x, self.conv.weight * scale[:, None, None, None], shift, self.conv.stride, self.conv.padding)
        )


class Stem(BaseModule):
    """Patch embedding of stride 4: 7x7 convolution (stride 2), any 3x3 convolutions, 2x2 convolution (stride 2)."""

    def __init__(self, in_channels: int, embed_dims: int, extra_convs: int):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormReLU(in_channels, embed_dims, 7, stride=2),
            *(ConvNormReLU(embed_dims, embed_dims, 3) for _ in range(extra_convs)),
        )
        self.proj = nn.Conv2d(embed_dims, embed_dims, 2, stride=2)
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, C_in, H, W) -> tokens (B, h * w, C), and (h, w)."""
        x = self.proj(self.convs(x.contiguous(memory_format=torch.channels_last)))
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])

    @staticmethod
    def output_side(side: int) -> int:
        """Height (or width) of the output map for an image of height (or width) ``side``."""
        return (side + 1) // 2 // 2


class PatchEmbed(BaseModule):
    """Overlapping patches: 3x3 convolution (stride 2) and a LayerNorm."""

    def __init__(self, in_channels: int, embed_dims: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dims, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, C_in, H, W) -> tokens (B, h * w, C), and (h, w)."""
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])

    @staticmethod
    def output_side(side: int) -> int:
        """Height (or width) of the output map for a map of height (or width) ``side``."""
        return (side + 1) // 2


class ShuntedStage(BaseModule):
    """Patch embedding, blocks and a norm. The normalized map is also the input of the next stage."""

    def __init__(self, patch_embed: BaseModule, blocks: list[ShuntedBlock], embed_dims: int, with_cp: bool):
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) -> map (B, C, h, w)."""
        x, hw_shape = self.patch_embed(x)
        for block in self.blocks:
            x = run_layer(block, self.with_cp, x=x, hw_shape=hw_shape)
        return tokens_to_map(self.norm(x), hw_shape)


@MODELS.register_module()
class ShuntedTransformer(PublishedBackbone):
    """Shunted Transformer as a detection backbone.

    Args:
        arch: 'tiny', 'small', 'base', or a dict with the keys of an entry of ``ARCHS``: ``embed_dims``, ``depths``,
            ``num_heads``, ``mlp_ratios``, ``sr_ratios`` (one value per stage; ``sr_ratios`` 1 or even, ``num_heads``
            even where ``sr_ratios`` > 1) and ``stem_convs`` (additional 3x3 convolutions in the stem).
        in_channels: channels of the images.
        out_indices: 0-based stages whose maps are returned, in increasing order; None: all. Strides are 4, 8, 16, 32.
        frozen_stages: -1 freezes nothing; 0 freezes the stem; k > 0 freezes the stem and the first k stages (norms
            in eval mode, no gradients).
        norm_eval: keep the stem's BatchNorm in eval mode (running statistics) while training.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        drop_path_rate: stochastic depth of the last block, 0-1; increases linearly from 0 over all blocks.
        drop_rate: dropout after projections and in the feed-forward layers, 0-1.
        attn_drop_rate: dropout of the attention weights, 0-1.
        qkv_bias: whether the query, key and value projections have a bias.
        init_cfg: ``dict(type='Pretrained', checkpoint=path_or_url)`` loads a published checkpoint, a converted one, or
            (with ``prefix='backbone.'``) that of a detector; None: the published initialization.

    Raises:
        ValueError: If ``arch`` is unknown or invalid, or an index is out of range.

    Example:
        >>> backbone = ShuntedTransformer('tiny')
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    family = 'shunted_transformer'

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        qkv_bias: bool = True,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        arch = resolve_arch(arch)
        depths, dims = arch['depths'], arch['embed_dims']
        self.in_channels = in_channels
        self.embed_dims = dims
        self.out_indices = check_indices(
            'out_indices', range(len(dims)) if out_indices is None else out_indices, len(dims), 'stages'
        )
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.frozen_stages = check_frozen_stages(frozen_stages, len(dims), 'stem', 'stages')
        self.norm_eval = norm_eval

        last = max(sum(depths) - 1, 1)
        drop_paths = iter(drop_path_rate * i / last for i in range(sum(depths)))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            patch_embed = Stem(in_channels, dim, arch['stem_convs']) if i == 0 else PatchEmbed(dims[i - 1], dim)
            blocks = [
                ShuntedBlock(
                    dim,
                    arch['num_heads'][i],
                    arch['mlp_ratios'][i],
                    arch['sr_ratios'][i],
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    next(drop_paths),
                )
                for _ in range(depths[i])
            ]
            self.stages.append(ShuntedStage(patch_embed, blocks, dim, with_cp))
        self._freeze_stages()

    def _draw_weights(self) -> None:
        self.apply(_init_module)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> one normalized map (B, C_i, H_i, W_i) per entry of ``out_indices``.

        Raises:
            ValueError: If the channels differ from ``in_channels``, or a map is smaller than the stage's ``sr_ratio``.
        """
        self._check_image(x)
        outs = []
        for i, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> 'ShuntedTransformer':
        """Set the mode; frozen stages, and with ``norm_eval`` every BatchNorm, stay in eval mode."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.stages[0].patch_embed] if self.frozen_stages >= 0 else []
        for module in frozen + list(self.stages[: max(self.frozen_stages, 0)]):
            module.eval().requires_grad_(False)

    def _check_image(self, x: Tensor) -> None:
        check_image('ShuntedTransformer', x, self.in_channels)
        height, width = x.shape[2:]
        for i, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            height, width = stage.patch_embed.output_side(height), stage.patch_embed.output_side(width)
            sr_ratio = stage.blocks[0].attn.sr_ratio
            if min(height, width) < sr_ratio:
                raise ValueError(
                    f'an image of {x.shape[2]}x{x.shape[3]} gives stage {i} a map of {height}x{width}, smaller than '
                    f'its reduction (sr_ratio={sr_ratio}); use images of at least '
                    f'{self.min_image_side}x{self.min_image_side} pixels'
                )

    @property
    def min_image_side(self) -> int:
        """Minimum height and width of the images, in pixels."""
        return max(
            (stage.blocks[0].attn.sr_ratio - 1) * 2 ** (i + 2) + 3
            for i, stage in enumerate(self.stages[: self.out_indices[-1] + 1])
        )


def resolve_arch(arch: str | dict) -> dict:
    """The arch dict of a published name, or a given dict; raises ValueError if the dict is invalid."""
    arch = choose_arch(arch, ARCHS)
    per_stage = {key: value for key, value in arch.items() if key != 'stem_convs'}
    for key, value in per_stage.items():
        if not isinstance(value, Sequence):
            raise ValueError(f'arch dict has {key}={value!r}; expected a tuple with one value per stage')
    num_stages = len(per_stage['embed_dims'])
    for key, value in per_stage.items():
        if len(value) != num_stages or min(value, default=0) <= 0:
            raise ValueError(
                f'arch dict has {key}={tuple(value)}; expected {num_stages} positive values, one per stage '
                f'as in embed_dims={tuple(per_stage["embed_dims"])}'
            )
    if arch['stem_convs'] < 0:
        raise ValueError(f'arch dict has stem_convs={arch["stem_convs"]}; expected 0 or more')
    for i in range(num_stages):
        try:
            check_attention_sizes(arch['embed_dims'][i], arch['num_heads'][i], arch['sr_ratios'][i])
        except ValueError as error:
            raise ValueError(f'arch dict is invalid in stage {i}: {error}') from None
    return arch


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
        module.reset_parameters()
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)

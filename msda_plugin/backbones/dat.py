"""DAT: a four-stage backbone of window attention and deformable attention.

Source: Xia et al., "Vision Transformer with Deformable Attention", CVPR 2022, https://arxiv.org/abs/2201.00520, with
the details of the authors' published code.
"""

import math
from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmdet.models.backbones.swin import WindowMSA
from mmengine.logging import print_log
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
from msda_plugin.layers.deformable_multi_head_attention import DeformableMultiHeadAttention, check_groups
from msda_plugin.layers.deformable_position_bias import RelativePositionTable
from msda_plugin.layers.layer_norm_2d import LayerNorm2d
from msda_plugin.layers.shifted_window_attention import ShiftedWindowAttention
from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map
from msda_plugin.layers.transformer_parts import run_layer
from msda_plugin.registry import MODELS

# The published sizes. `blocks` gives the attention of each block of a stage (L: windows, S: shifted windows, D:
# deformable); `kernel_sizes` belong to the offset networks.
_COMMON = dict(
    num_heads=(3, 6, 12, 24),
    num_groups=(1, 1, 3, 6),
    kernel_sizes=(9, 7, 5, 3),
    mlp_ratio=4,
    window_size=7,
    image_size=224,
)
ARCHS = {
    'tiny': dict(_COMMON, embed_dims=(96, 192, 384, 768), blocks=('LS', 'LS', 'LD' * 3, 'LD'), drop_path_rate=0.2),
    'small': dict(_COMMON, embed_dims=(96, 192, 384, 768), blocks=('LS', 'LS', 'LD' * 9, 'LD'), drop_path_rate=0.3),
    'base': dict(
        _COMMON,
        embed_dims=(128, 256, 512, 1024),
        blocks=('LS', 'LS', 'LD' * 9, 'LD'),
        drop_path_rate=0.5,
        num_heads=(4, 8, 16, 32),
        num_groups=(1, 1, 4, 8),
    ),
}
STEM_STRIDE = 4


class PatchEmbed(BaseModule):
    """Non-overlapping patches: a convolution with equal stride and kernel size, and a LayerNorm."""

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size, bias=bias)
        self.norm = nn.LayerNorm(embed_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, C_in, H, W) -> tokens (B, h * w, C), and (h, w); incomplete patches are dropped."""
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])


class DATBlock(BaseModule):
    """Pre-norm transformer block with window or deformable attention.

    Args:
        attn: ``ShiftedWindowAttention`` or ``DeformableMultiHeadAttention``.
        embed_dims: channels C.
        hidden_dims: hidden channels of the feed-forward layer.
        drop_rate: dropout in the feed-forward layer, 0-1.
        drop_path_rate: stochastic depth, 0-1.
    """

    def __init__(self, attn: BaseModule, embed_dims: int, hidden_dims: int, drop_rate: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dims, hidden_dims),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Linear(hidden_dims, embed_dims),
            nn.Dropout(drop_rate),
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) of a map of ``hw_shape`` (H, W) -> tokens (B, H * W, C)."""
        attended = self.norm1(x)
        if isinstance(self.attn, DeformableMultiHeadAttention):
            attended = map_to_tokens(self.attn(tokens_to_map(attended, hw_shape)))
        else:
            attended = self.attn(attended, hw_shape)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DATStage(BaseModule):
    """Patch embedding and blocks; the output is not normalized."""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[DATBlock], with_cp: bool):
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) -> map (B, C, h, w)."""
        x, hw_shape = self.patch_embed(x)
        for block in self.blocks:
            x = run_layer(block, self.with_cp, x=x, hw_shape=hw_shape)
        return tokens_to_map(x, hw_shape)


@MODELS.register_module()
class DAT(PublishedBackbone):
    """DAT (CVPR 2022) as a detection backbone.

    Accepts images of any size. The tables of deformable attention have the size of ``image_size``'s maps and are
    resized (bicubic) for others; maps are padded to complete windows.

    Args:
        arch: 'tiny', 'small', 'base', or a dict with the keys of an entry of ``ARCHS``: ``embed_dims``, ``blocks`` (one
            letter per block: L windows, S windows shifted by half a window, rounded up, D deformable), ``num_heads``,
            ``num_groups`` and ``kernel_sizes`` (of D blocks), one value per stage; ``mlp_ratio``, ``window_size``,
            ``image_size`` (side of the images that the tables belong to, in pixels) and ``drop_path_rate``.
        in_channels: channels of the images.
        out_indices: 0-based stages whose maps are returned, in increasing order; None: all. Strides are 4, 8, 16, 32.
        frozen_stages: -1 freezes nothing; 0 freezes the stem; k > 0 freezes the stem and the first k stages with the
            norms of their maps (no gradients, eval mode).
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        drop_path_rate: stochastic depth of the last block, 0-1; increases linearly from 0 over all blocks. None: the
            value of ``arch``, which is 0.2, 0.3, 0.5 for 'tiny', 'small', 'base'.
        drop_rate: dropout after projections and in the feed-forward layers, 0-1.
        attn_drop_rate: dropout of the attention weights, 0-1.
        init_cfg: ``dict(type='Pretrained', checkpoint=path_or_url)`` loads a published checkpoint, a converted one, or
            (with ``prefix='backbone.'``) that of a detector; None: the published initialization.

    When a checkpoint is loaded, its tables are resized to those of ``arch``, and norms of maps that are not returned
    are ignored; both are logged.

    Raises:
        ValueError: If ``arch`` is unknown or invalid, or an index is out of range.

    Example:
        >>> backbone = DAT('tiny')
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    family = 'dat'

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        arch = resolve_arch(arch)
        dims, blocks = arch['embed_dims'], arch['blocks']
        self.in_channels = in_channels
        self.embed_dims = dims
        self.out_indices = check_indices(
            'out_indices', range(len(dims)) if out_indices is None else out_indices, len(dims), 'stages'
        )
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.frozen_stages = check_frozen_stages(frozen_stages, len(dims), 'stem', 'stages')

        drop_path_rate = arch['drop_path_rate'] if drop_path_rate is None else drop_path_rate
        depth = sum(map(len, blocks))
        drop_paths = iter(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            patch_embed = (
                PatchEmbed(in_channels, dim, STEM_STRIDE, bias=True)
                if i == 0
                else PatchEmbed(dims[i - 1], dim, 2, bias=False)
            )
            self.stages.append(
                DATStage(
                    patch_embed,
                    [
                        DATBlock(
                            _build_attention(kind, arch, i, attn_drop_rate, drop_rate),
                            dim,
                            int(dim * arch['mlp_ratio']),
                            drop_rate,
                            next(drop_paths),
                        )
                        for kind in blocks[i]
                    ],
                    with_cp,
                )
            )
        self.norms = nn.ModuleDict({str(i): LayerNorm2d(dims[i], eps=1e-5) for i in self.out_indices})
        self._freeze_stages()

    def _draw_weights(self) -> None:
        self.apply(_init_module)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> one normalized map (B, C_i, H_i, W_i) per entry of ``out_indices``.

        Raises:
            ValueError: If the channels differ from ``in_channels``, or the images are smaller than a stage's stride.
        """
        self._check_image(x)
        outs = []
        for i, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                outs.append(self.norms[str(i)](x))
        return tuple(outs)

    def _freeze_stages(self) -> None:
        frozen = [self.stages[0].patch_embed] if self.frozen_stages >= 0 else []
        for i in range(self.frozen_stages):
            frozen += [self.stages[i], *(self.norms[key] for key in self.norms if key == str(i))]
        for module in frozen:
            module.eval().requires_grad_(False)

    def _check_image(self, x: Tensor) -> None:
        check_image('DAT', x, self.in_channels)
        if min(x.shape[2:]) < self.min_image_side:
            raise ValueError(
                f'an image of {x.shape[2]}x{x.shape[3]} is smaller than the stride of stage {self.out_indices[-1]}; '
                f'use images of at least {self.min_image_side}x{self.min_image_side} pixels'
            )

    @property
    def min_image_side(self) -> int:
        """Minimum height and width of the images, in pixels."""
        return STEM_STRIDE * 2 ** self.out_indices[-1]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self._fit_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """In place, resize tables of another resolution, and remove norms of maps that this model does not return."""
        done = []
        for name, own in self.named_parameters():
            table = state_dict.get(prefix + name)
            if name.endswith('table') and table is not None and table.shape != own.shape:
                resized = _resize_table(table, own.shape)
                if resized is not None:
                    done.append(f'resized {name} from {tuple(table.shape)} to {tuple(own.shape)}')
                    state_dict[prefix + name] = resized
        for key in [key for key in state_dict if key.startswith(f'{prefix}norms.')]:
            if key.removeprefix(f'{prefix}norms.').split('.')[0] not in self.norms:
                done.append(f'ignored {key.removeprefix(prefix)}')
                del state_dict[key]
        if done:
            print_log(f'DAT checkpoint: {"; ".join(done)}', logger='current')


def resolve_arch(arch: str | dict) -> dict:
    """The arch dict of a published name, or a given dict; raises ValueError if the dict is invalid."""
    arch = choose_arch(arch, ARCHS)
    per_stage = {key: arch[key] for key in ('embed_dims', 'blocks', 'num_heads', 'num_groups', 'kernel_sizes')}
    for key, value in per_stage.items():
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(arch['blocks']):
            raise ValueError(
                f'arch dict has {key}={value!r}; expected a tuple with one value per stage, as in '
                f'blocks={arch["blocks"]!r}'
            )
    if not all(blocks and set(blocks) <= set('LSD') for blocks in arch['blocks']):
        raise ValueError(f'arch dict has blocks={arch["blocks"]!r}; expected a string of L, S and D for each stage')
    least_image = STEM_STRIDE * 2 ** (len(arch['blocks']) - 1)
    for key, least in (('mlp_ratio', 1), ('window_size', 2), ('image_size', least_image)):
        if arch[key] < least:
            raise ValueError(f'arch dict has {key}={arch[key]}; expected at least {least}')
    for i in range(len(arch['blocks'])):
        try:
            check_groups(arch['embed_dims'][i], arch['num_heads'][i], arch['num_groups'][i])
        except ValueError as error:
            raise ValueError(f'arch dict is invalid in stage {i}: {error}') from None
    return arch


def _build_attention(kind: str, arch: dict, stage: int, attn_drop_rate: float, proj_drop_rate: float) -> BaseModule:
    """Build the attention of a block from its letter."""
    dims, heads = arch['embed_dims'][stage], arch['num_heads'][stage]
    rates = dict(attn_drop_rate=attn_drop_rate, proj_drop_rate=proj_drop_rate)
    if kind == 'D':
        map_size = arch['image_size'] // STEM_STRIDE // 2**stage
        return DeformableMultiHeadAttention(
            dims, heads, arch['num_groups'][stage], map_size, arch['kernel_sizes'][stage], **rates
        )
    shift = math.ceil(arch['window_size'] / 2) if kind == 'S' else 0
    attn = ShiftedWindowAttention(dims, heads, arch['window_size'], shift, **rates)
    # The index depends on the window size, so a checkpoint with another window size must not replace it.
    attn.w_msa.register_buffer('relative_position_index', attn.w_msa.relative_position_index, persistent=False)
    return attn


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | RelativePositionTable):
        module.reset_parameters()
    elif isinstance(module, WindowMSA):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.01)


def _resize_table(table: Tensor, shape: torch.Size) -> Tensor | None:
    """Resize a table of windows (side ** 2, heads) or of a map (heads, H, W); None if the number of heads differs."""
    if table.dim() != len(shape):
        return None
    if len(shape) == 3:
        return F.interpolate(table[None], shape[1:], mode='bicubic')[0] if table.shape[0] == shape[0] else None
    side, new_side = math.isqrt(table.shape[0]), math.isqrt(shape[0])
    if side**2 != table.shape[0] or table.shape[1] != shape[1]:
        return None
    maps = F.interpolate(table.t().unflatten(1, (side, side))[None], (new_side, new_side), mode='bicubic')
    return maps[0].flatten(1).t()

"""Deformable multi-head attention of DAT: every query attends to the same few points, which the map itself moves.

Sources: Xia et al., "Vision Transformer with Deformable Attention", CVPR 2022, https://arxiv.org/abs/2201.00520 (form
'v1'), and Xia et al., "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention", 2023,
https://arxiv.org/abs/2309.01430 (form 'v2'), with the details of the authors' published code.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from mmengine.utils import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from msda_plugin.registry import MODELS

from .deformable_position_bias import FixedPositionTable, LogSpacedPositionBias, RelativePositionTable
from .token_layout import check_heads, map_to_tokens, tokens_to_map

VERSIONS = ('v1', 'v2')
POSITIONAL_MODES = ('rpe_table', 'dwc_pe', 'fixed_pe', 'log_cpb', 'none')

# Position biases, with what they are made from, are held for as many queries at a time as fit in this size.
CHUNK_BYTES = 32 * 2**20


class DeformedPoints(NamedTuple):
    """Where a deformable layer sampled its keys; all (B, num_groups, Hk, Wk, 2), (y, x), -1 to 1 over the map.

    Attributes:
        offsets: the offset network's output, scaled; added to the references.
        positions: where the map was sampled.
        references: the regular grid.
    """

    offsets: Tensor
    positions: Tensor
    references: Tensor


@MODELS.register_module()
class DeformableMultiHeadAttention(BaseModule):
    """Multi-head attention of a map's pixels to points that were moved off a regular grid (DAT's DMHA).

    The queries, split into groups of channels, pass through a small network (depthwise convolution, LayerNorm, GELU,
    1x1 convolution) that gives each group its own Hk x Wk offsets. Keys and values are projections of the map, sampled
    bilinearly at the offset points (align_corners, zeros outside); the heads of a group share its points.

    ============== ====================================== =========================================================
    ..             'v1' (CVPR 2022)                       'v2' (DAT++)
    ============== ====================================== =========================================================
    references     cell centres, (2i + 1) / n - 1         (2i + 1) / (n - 1) - 1, the last one outside of the map
    query grid     cell centres                           2i / (n - 1) - 1
    offset unit    1 / n                                  1 / (n - 1)
    factor < 0     tanh(offset + reference)               clamp(offset + reference, -1, 1)
    padding        kernel_size // 2                       0 where kernel_size == stride, else kernel_size // 2
    ============== ====================================== =========================================================

    Positional modes: 'rpe_table' adds a table of relative positions, interpolated bilinearly, to the logits; 'log_cpb'
    adds a small MLP of the log-spaced displacement; 'fixed_pe' adds a table of every query against every point;
    'dwc_pe' adds a 3x3 depthwise convolution of the queries to the result; 'none' adds nothing.

    Any map can be given. The 'rpe_table' of 'v1' and the 'fixed_pe' table belong to ``map_size`` and are resized
    bicubically for other maps. The logits, and the bias they take, are held for a few queries at a time
    (``CHUNK_BYTES``); with gradients each such part is computed again in the backward pass.

    Args:
        embed_dims: channels C; a multiple of ``num_heads`` and of ``num_groups``.
        num_heads: heads; a multiple of ``num_groups``.
        num_groups: groups of channels with points of their own.
        map_size: (H, W), or the side, of the map that the table is made for; for 'rpe_table' and 'fixed_pe' alone.
        kernel_size: of the offset network's depthwise convolution.
        stride: of the same: the map's pixels per point, along each axis.
        offset_range_factor: the largest offset, in offset units. 0 switches the offsets off in 'v2', and takes them
            as the network gives them in 'v1'; below 0 they are free, and the positions are kept in the map.
        positional: one of ``POSITIONAL_MODES``.
        version: 'v1' or 'v2'.
        attn_drop_rate: dropout of the attention weights, 0-1.
        proj_drop_rate: dropout of the output, 0-1.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: if dims, heads and groups do not fit one another, or an option is out of range.

    Example:
        >>> layer = DeformableMultiHeadAttention(96, num_heads=6, num_groups=3, map_size=14)
        >>> out, points = layer(torch.rand(1, 96, 20, 30), return_points=True)
        >>> tuple(out.shape), tuple(points.positions.shape)
        ((1, 96, 20, 30), (1, 3, 20, 30, 2))
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_groups: int,
        map_size: int | tuple[int, int] | None = None,
        kernel_size: int = 5,
        stride: int = 1,
        offset_range_factor: float = 2.0,
        positional: str = 'rpe_table',
        version: str = 'v1',
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        check_groups(embed_dims, num_heads, num_groups)
        for name, value, known in (('version', version, VERSIONS), ('positional', positional, POSITIONAL_MODES)):
            if value not in known:
                raise ValueError(f'unknown {name} {value!r}; known: {list(known)}')
        if kernel_size < 1 or stride < 1:
            raise ValueError(f'kernel_size={kernel_size} and stride={stride} do not fit; expected 1 or more')
        padding = 0 if version == 'v2' and kernel_size == stride else kernel_size // 2
        self.min_map_side = max(kernel_size - 2 * padding, 1)
        if positional in ('rpe_table', 'fixed_pe'):
            if map_size is None or min(to_2tuple(map_size)) < self.min_map_side:
                raise ValueError(
                    f'map_size={map_size} does not fit; the table of positional={positional!r} is made '
                    f'for a map of a given size, at least {self.min_map_side} a side: give (H, W)'
                )
            map_size = tuple(to_2tuple(map_size))
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.offset_range_factor = offset_range_factor
        self.version = version
        self.attn_drop_rate = attn_drop_rate

        group_dims = embed_dims // num_groups
        self.offset_conv = nn.Conv2d(group_dims, group_dims, kernel_size, stride, padding, groups=group_dims)
        self.offset_norm = nn.LayerNorm(group_dims)
        self.offset_proj = nn.Linear(group_dims, 2, bias=False)
        self.query = nn.Linear(embed_dims, embed_dims)
        self.key = nn.Linear(embed_dims, embed_dims)
        self.value = nn.Linear(embed_dims, embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

        self.position_bias = self.position_conv = None
        if positional == 'rpe_table':
            self.position_bias = RelativePositionTable(num_heads, num_groups, map_size, resize=version == 'v1')
        elif positional == 'log_cpb':
            self.position_bias = LogSpacedPositionBias(num_heads, num_groups)
        elif positional == 'fixed_pe':
            num_points = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in map_size)
            self.position_bias = FixedPositionTable(num_heads, map_size, num_points)
        elif positional == 'dwc_pe':
            self.position_conv = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)

    def forward(self, x: Tensor, return_points: bool = False) -> Tensor | tuple[Tensor, DeformedPoints]:
        """Attend.

        Args:
            x: map (B, C, H, W).
            return_points: whether to return the points as well.

        Returns:
            Map (B, C, H, W), channels-last in memory; with ``return_points`` also the ``DeformedPoints``.

        Raises:
            ValueError: if the channels differ from ``embed_dims``, or the map is too small for a point.
        """
        self._check_map(x)
        hw_shape = x.shape[2:]
        query = self.query(map_to_tokens(x))
        points = self._deform(tokens_to_map(query, hw_shape))
        sampled = self._sample(x, points.positions)
        out = self._attend(query, self.key(sampled), self.value(sampled), points.positions, hw_shape)
        if self.position_conv is not None:
            out = out + map_to_tokens(self.position_conv(tokens_to_map(query, hw_shape)))
        out = tokens_to_map(self.proj_drop(self.proj(out)), hw_shape)
        return (out, points) if return_points else out

    def _deform(self, query: Tensor) -> DeformedPoints:
        """Queries as a map (B, C, H, W) -> the points, in float32 at least: halves cannot tell near pixels apart."""
        offsets = self.offset_conv(self._split_groups(query)).permute(0, 2, 3, 1)
        offsets = self.offset_proj(F.gelu(self.offset_norm(offsets)))
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        offsets = offsets.unflatten(0, (query.shape[0], self.num_groups))
        hk_wk = offsets.shape[2:4]
        if self.offset_range_factor > 0 or (self.offset_range_factor == 0 and self.version == 'v2'):
            units = [self.offset_range_factor / self._cells(side) for side in hk_wk]
            offsets = torch.stack([t * unit for t, unit in zip(offsets.tanh().unbind(-1), units, strict=True)], dim=-1)
        references = self._grid(hk_wk, 0.5, offsets).expand_as(offsets)
        positions = offsets + references
        if self.offset_range_factor < 0:
            positions = positions.tanh() if self.version == 'v1' else positions.clamp(-1, 1)
        return DeformedPoints(offsets, positions, references)

    def _sample(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map (B, C, H, W) and points (B, num_groups, Hk, Wk, 2) -> tokens (B, Hk * Wk, C)."""
        groups = self._split_groups(x).to(positions.dtype)
        sampled = F.grid_sample(groups, positions.flatten(0, 1).flip(-1), align_corners=True)
        return sampled.reshape(x.shape[0], self.embed_dims, *sampled.shape[2:]).flatten(2).transpose(1, 2).to(x.dtype)

    def _split_groups(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> (B * num_groups, C / num_groups, H, W)."""
        return x.reshape(x.shape[0] * self.num_groups, self.embed_dims // self.num_groups, *x.shape[2:])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, hw_shape: torch.Size) -> Tensor:
        """Queries (B, H * W, C), keys and values (B, n, C) at n points -> (B, H * W, C), heads side by side in C."""
        query, key, value = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        dropout = self.attn_drop_rate if self.training else 0.0
        if self.position_bias is None:
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
            return out.transpose(1, 2).flatten(2)
        make_bias = self.position_bias(self._grid(hw_shape, 0.0, positions), positions)

        def attend(part: slice) -> Tensor:
            bias = make_bias(part).to(query.dtype)
            return F.scaled_dot_product_attention(query[:, :, part], key, value, bias, dropout)

        parts = list(self._parts(query.shape[2], positions))
        if len(parts) > 1 and torch.is_grad_enabled():
            outs = [checkpoint(attend, part, use_reentrant=False, preserve_rng_state=dropout > 0) for part in parts]
        else:
            outs = [attend(part) for part in parts]
        return torch.cat(outs, dim=2).transpose(1, 2).flatten(2)

    def _parts(self, num_queries: int, positions: Tensor) -> Iterator[slice]:
        """Slices of the queries whose biases take at most ``CHUNK_BYTES``."""
        batch, _, hk, wk, _ = positions.shape
        bytes_per_query = batch * hk * wk * self.position_bias.values_per_pair * positions.element_size()
        size = max(CHUNK_BYTES // max(bytes_per_query, 1), 1)  # an empty batch has none
        return (slice(start, start + size) for start in range(0, num_queries, size))

    def _grid(self, size: torch.Size, first: float, like: Tensor) -> Tensor:
        """The regular grid (h, w, 2), (y, x), whose pixels lie ``first`` to ``first`` + side - 1 offset units in."""
        if self.version == 'v1':
            first = 0.5
        axes = [
            (torch.arange(side, dtype=like.dtype, device=like.device) + (first if side > 1 else 0.5))
            / self._cells(side)
            * 2
            - 1
            for side in size
        ]
        return torch.stack(torch.meshgrid(axes, indexing='ij'), dim=-1)

    def _cells(self, side: int) -> int:
        """Offset units (of which a map is 2 long, -1 to 1) along a side of that many pixels."""
        return side if self.version == 'v1' else max(side - 1, 1)

    def _check_map(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.embed_dims:
            raise ValueError(
                f'DeformableMultiHeadAttention got a map of shape {tuple(x.shape)}; expected '
                f'(B, {self.embed_dims}, H, W)'
            )
        if min(x.shape[2:]) < self.min_map_side:
            raise ValueError(
                f'DeformableMultiHeadAttention got a {x.shape[2]}x{x.shape[3]} map, too small for a '
                f'point; give at least {self.min_map_side} rows and columns, or a smaller kernel_size'
            )


def check_groups(embed_dims: int, num_heads: int, num_groups: int) -> None:
    """Raise ValueError where channels, heads and groups of a deformable layer do not fit one another."""
    check_heads(embed_dims, num_heads)
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(
            f'num_heads={num_heads} is not a multiple of num_groups={num_groups}, and the points of a '
            'group are shared by whole heads; change one of them'
        )

"""Deformable multi-head attention of DAT: all queries attend to the same few points, moved by learned offsets.

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

from msda_plugin.layers.deformable_position_bias import (
    FixedPositionTable,
    LogSpacedPositionBias,
    PartialBias,
    RelativePositionTable,
)
from msda_plugin.layers.token_layout import check_heads, map_to_tokens, merge_heads, split_heads, tokens_to_map
from msda_plugin.registry import MODELS

VERSIONS = ('v1', 'v2')
POSITIONAL_MODES = ('rpe_table', 'dwc_pe', 'fixed_pe', 'log_cpb', 'none')

# Position biases are computed for as many queries at a time as fit, with their intermediate results, in this size.
CHUNK_BYTES = 32 * 2**20


class DeformedPoints(NamedTuple):
    """The points at which a deformable layer sampled its keys.

    All tensors are (B, num_groups, Hk, Wk, 2), (y, x). -1 and 1 are the centers of the map's border pixels.

    Attributes:
        offsets: the offset network's scaled output, added to the references.
        positions: the sampled points.
        references: the regular grid that the offsets start from.
    """

    offsets: Tensor
    positions: Tensor
    references: Tensor


class AttentionInputs(NamedTuple):
    """The inputs of the attention from all pixels to the deformed points.

    The weights of a slice of the queries are ``attention_weights(query[:, :, part], key, bias(part))`` of
    :mod:`msda_plugin.layers.attention_weights`.

    Attributes:
        query: (B, num_heads, H * W, head_dim), the pixels row by row.
        key, value: (B, num_heads, Hk * Wk, head_dim), at ``points.positions``.
        bias: maps a slice of the H * W queries to their biases, (B or 1, num_heads, slice, Hk * Wk); None: no bias.
        points: the deformed points of each group of heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: PartialBias | None
    points: DeformedPoints


@MODELS.register_module()
class DeformableMultiHeadAttention(BaseModule):
    """Multi-head attention of a map's pixels to points moved off a regular grid (DAT's DMHA).

    A small network (depthwise convolution, LayerNorm, GELU, 1x1 convolution) computes Hk x Wk offsets for each group of
    query channels. Keys and values are projections of the map, sampled bilinearly at the offset points (align_corners,
    zeros outside). The heads of a group share its points.

    ============== ====================================== =========================================================
    ..             'v1' (CVPR 2022)                       'v2' (DAT++)
    ============== ====================================== =========================================================
    references     cell centers, (2i + 1) / n - 1         (2i + 1) / (n - 1) - 1, the last one outside of the map
    query grid     cell centers                           2i / (n - 1) - 1
    offset unit    1 / n                                  1 / (n - 1)
    factor < 0     tanh(offset + reference)               clamp(offset + reference, -1, 1)
    padding        kernel_size // 2                       0 where kernel_size == stride, else kernel_size // 2
    ============== ====================================== =========================================================

    Positional modes: 'rpe_table' adds a table of relative positions, interpolated bilinearly, to the logits; 'log_cpb'
    adds a small MLP of the log-spaced displacement; 'fixed_pe' adds a table of every query against every point;
    'dwc_pe' adds a 3x3 depthwise convolution of the queries to the result; 'none' adds nothing.

    Maps can have any size. The 'rpe_table' of 'v1' and the 'fixed_pe' table are made for ``map_size`` and resized
    bicubically for other maps. Logits and biases are computed for a few queries at a time (``CHUNK_BYTES``), and
    recomputed in the backward pass.

    Args:
        embed_dims: channels C; a multiple of ``num_heads`` and of ``num_groups``.
        num_heads: number of heads; a multiple of ``num_groups``.
        num_groups: number of channel groups; each has its own points.
        map_size: (H, W), or the side, of the map that the table is made for; used by 'rpe_table' and 'fixed_pe' only.
        kernel_size: of the offset network's depthwise convolution.
        stride: of the offset network's depthwise convolution: pixels per point along each axis.
        offset_range_factor: the largest offset, in offset units. 0 disables the offsets in 'v2', and leaves them
            unlimited in 'v1'. Below 0 the offsets are unlimited, and the positions are limited to the map.
        positional: one of ``POSITIONAL_MODES``.
        version: 'v1' or 'v2'.
        attn_drop_rate: dropout of the attention weights, 0-1.
        proj_drop_rate: dropout of the output, 0-1.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, ``num_groups`` does not divide ``num_heads``, or an
            option is out of range.

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
            raise ValueError(f'kernel_size={kernel_size}, stride={stride}; expected at least 1 for both')
        padding = 0 if version == 'v2' and kernel_size == stride else kernel_size // 2
        self.min_map_side = max(kernel_size - 2 * padding, 1)
        if positional in ('rpe_table', 'fixed_pe'):
            if map_size is None or min(to_2tuple(map_size)) < self.min_map_side:
                raise ValueError(
                    f'map_size={map_size}; expected (H, W), both at least {self.min_map_side}: the table of '
                    f'positional={positional!r} is made for a given map size'
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
            return_points: also return the ``DeformedPoints``.

        Returns:
            Map (B, C, H, W), channels-last in memory; with ``return_points`` also the ``DeformedPoints``.

        Raises:
            ValueError: If the map does not have ``embed_dims`` channels, or is too small for one point.
        """
        self._check_map(x)
        hw_shape = x.shape[2:]
        inputs = self.attention_inputs(x)
        out = merge_heads(self._attend(inputs))
        if self.position_conv is not None:
            out = out + map_to_tokens(self.position_conv(tokens_to_map(merge_heads(inputs.query), hw_shape)))
        out = tokens_to_map(self.proj_drop(self.proj(out)), hw_shape)
        return (out, inputs.points) if return_points else out

    def attention_inputs(self, x: Tensor) -> AttentionInputs:
        """Queries, keys, values, biases and deformed points of :meth:`forward` for the same map ``x``."""
        hw_shape = x.shape[2:]
        query = self.query(map_to_tokens(x))
        points = self._deform(tokens_to_map(query, hw_shape))
        sampled = self._sample(x, points.positions)
        bias = None
        if self.position_bias is not None:
            bias = self.position_bias(self._grid(hw_shape, 0.0, points.positions), points.positions)
        query, key, value = (split_heads(t, self.num_heads) for t in (query, self.key(sampled), self.value(sampled)))
        return AttentionInputs(query, key, value, bias, points)

    def _deform(self, query: Tensor) -> DeformedPoints:
        """Queries as a map (B, C, H, W) -> the points, at least float32: half precision merges neighboring pixels."""
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

    def _attend(self, inputs: AttentionInputs) -> Tensor:
        """-> (B, num_heads, H * W, head_dim)."""
        query, key, value, make_bias, points = inputs
        dropout = self.attn_drop_rate if self.training else 0.0
        if make_bias is None:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)

        def attend(part: slice) -> Tensor:
            bias = make_bias(part).to(query.dtype)
            return F.scaled_dot_product_attention(query[:, :, part], key, value, bias, dropout)

        parts = list(self._parts(query.shape[2], points.positions))
        if len(parts) > 1 and torch.is_grad_enabled():
            outs = [checkpoint(attend, part, use_reentrant=False, preserve_rng_state=dropout > 0) for part in parts]
        else:
            outs = [attend(part) for part in parts]
        return torch.cat(outs, dim=2)

    def _parts(self, num_queries: int, positions: Tensor) -> Iterator[slice]:
        """Slices of the queries whose biases take at most ``CHUNK_BYTES``."""
        batch, _, hk, wk, _ = positions.shape
        bytes_per_query = batch * hk * wk * self.position_bias.values_per_pair * positions.element_size()
        size = max(CHUNK_BYTES // max(bytes_per_query, 1), 1)  # 0 bytes for an empty batch
        return (slice(start, start + size) for start in range(0, num_queries, size))

    def _grid(self, size: torch.Size, first: float, like: Tensor) -> Tensor:
        """The regular grid (h, w, 2), (y, x), -1 to 1: positions ``first`` to ``first`` + side - 1 in offset units."""
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
        """Offset units along a side of that many pixels, whose length is 2, from -1 to 1."""
        return side if self.version == 'v1' else max(side - 1, 1)

    def _check_map(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.embed_dims:
            raise ValueError(
                f'DeformableMultiHeadAttention got a map of shape {tuple(x.shape)}; expected '
                f'(B, {self.embed_dims}, H, W)'
            )
        if min(x.shape[2:]) < self.min_map_side:
            raise ValueError(
                f'DeformableMultiHeadAttention got a {x.shape[2]}x{x.shape[3]} map, which is too small for one '
                f'point; give at least {self.min_map_side} rows and columns, or set a smaller kernel_size'
            )


def check_groups(embed_dims: int, num_heads: int, num_groups: int) -> None:
    """Raise ValueError unless ``num_heads`` divides ``embed_dims`` and ``num_groups`` divides ``num_heads``."""
    check_heads(embed_dims, num_heads)
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(
            f'num_heads={num_heads} is not a multiple of num_groups={num_groups}, but each head belongs to '
            'one group; change one of them'
        )

"""Shunted self-attention: the heads of one layer attend to keys and values at two scales.

Source: Ren et al., "Shunted Self-Attention via Multi-Scale Token Aggregation", CVPR 2022,
https://arxiv.org/abs/2111.15193, with the details of the authors' published code where the two differ.
"""

from typing import NamedTuple

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.token_layout import (
    check_heads,
    check_tokens,
    map_to_tokens,
    merge_heads,
    split_heads,
    tokens_to_map,
)
from msda_plugin.registry import MODELS


class AttentionScale(NamedTuple):
    """Queries, keys and values of the heads that attend at one scale.

    Attributes:
        rate: side of the window of tokens merged into one key; 1: not merged.
        query: (B, heads of the scale, H * W, head_dim).
        key, value: (B, heads of the scale, floor(H / rate) * floor(W / rate), head_dim), row by row.
    """

    rate: int
    query: Tensor
    key: Tensor
    value: Tensor


class TokenAggregation(BaseModule):
    """Keys and values of one scale: a strided convolution merges ``rate`` x ``rate`` tokens into one.

    Args:
        embed_dims: channels C of the incoming tokens.
        out_dims: channels of the keys, and of the values.
        rate: side of the merged window; rows and columns that do not fill a window are ignored.
        qkv_bias: whether the key-value projection has a bias.
    """

    def __init__(self, embed_dims: int, out_dims: int, rate: int, qkv_bias: bool = True):
        super().__init__()
        self.rate = rate
        self.reduction = nn.Conv2d(embed_dims, embed_dims, rate, stride=rate)
        self.norm = nn.LayerNorm(embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * out_dims, bias=qkv_bias)
        self.local_enhancement = nn.Conv2d(out_dims, out_dims, 3, padding=1, groups=out_dims)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) -> keys and values, each (B, floor(H / rate) * floor(W / rate), out_dims)."""
        x = self.reduction(x)
        hw_shape = x.shape[2:]
        key, value = self.kv(F.gelu(self.norm(map_to_tokens(x)))).chunk(2, dim=-1)
        return key, value + map_to_tokens(self.local_enhancement(tokens_to_map(value, hw_shape)))


@MODELS.register_module()
class ShuntedSelfAttention(BaseModule):
    """Multi-head self-attention over a map, the keys and values at reduced scales.

    With ``sr_ratio`` r > 1 the first half of the heads attends to tokens merged over r x r windows, the second half
    over r/2 x r/2 windows; a depthwise convolution is added to the values before the attention (the paper's local
    enhancement, equation 4). With r = 1 every head attends to every token, and the depthwise convolution of the
    values is added after the attention. The attention matrix is never stored.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: number of heads; even if ``sr_ratio`` > 1, since each scale gets half of them.
        sr_ratio: the coarser spatial reduction; 1, or an even number.
        qkv_bias: whether the query, key and value projections have a bias.
        attn_drop_rate: dropout of the attention weights, 0-1.
        proj_drop_rate: dropout of the output, 0-1.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or ``sr_ratio`` > 1 is odd, or ``sr_ratio`` > 1 and
            ``num_heads`` is odd.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        check_attention_sizes(embed_dims, num_heads, sr_ratio)
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.attn_drop_rate = attn_drop_rate
        self.query = nn.Linear(embed_dims, embed_dims, bias=qkv_bias)
        if sr_ratio > 1:
            self.branches = nn.ModuleList(
                TokenAggregation(embed_dims, embed_dims // 2, rate, qkv_bias) for rate in (sr_ratio, sr_ratio // 2)
            )
        else:
            self.kv = nn.Linear(embed_dims, 2 * embed_dims, bias=qkv_bias)
            self.local_enhancement = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            x: tokens (B, H * W, C), row by row.
            hw_shape: (H, W); each at least ``sr_ratio``.

        Returns:
            Tokens (B, H * W, C).

        Raises:
            ValueError: If the tokens do not match ``hw_shape`` or ``embed_dims``, or a side of the map is shorter than
                ``sr_ratio``.
        """
        height, width = hw_shape
        check_tokens(self, x, hw_shape)
        if min(height, width) < self.sr_ratio:
            raise ValueError(
                f'ShuntedSelfAttention got a {height}x{width} map, but sr_ratio={self.sr_ratio} needs at '
                f'least {self.sr_ratio} rows and columns; give a larger image or a smaller sr_ratio'
            )
        scales = self.scales(x, hw_shape)
        dropout = self.attn_drop_rate if self.training else 0.0
        heads = [
            merge_heads(F.scaled_dot_product_attention(scale.query, scale.key, scale.value, dropout_p=dropout))
            for scale in scales
        ]
        if self.sr_ratio > 1:
            x = torch.cat(heads, dim=-1)
        else:
            value = tokens_to_map(merge_heads(scales[0].value), hw_shape)
            x = heads[0] + map_to_tokens(self.local_enhancement(value))
        return self.proj_drop(self.proj(x))

    def scales(self, x: Tensor, hw_shape: tuple[int, int]) -> list[AttentionScale]:
        """Queries, keys and values of each scale, coarse first. Arguments are those of :meth:`forward`.

        The first heads of the layer belong to the first scale. The weights of a scale are
        ``attention_weights(scale.query, scale.key)`` of :mod:`msda_plugin.layers.attention_weights`.
        """
        query = self.query(x)
        if self.sr_ratio == 1:
            key, value = self.kv(x).chunk(2, dim=-1)
            return [AttentionScale(1, *(split_heads(t, self.num_heads) for t in (query, key, value)))]
        x = tokens_to_map(x, hw_shape)
        return [
            AttentionScale(branch.rate, *(split_heads(t, self.num_heads // 2) for t in (half_of_query, *branch(x))))
            for half_of_query, branch in zip(query.chunk(2, dim=-1), self.branches, strict=True)
        ]


def check_attention_sizes(embed_dims: int, num_heads: int, sr_ratio: int) -> None:
    """Raise ValueError for sizes that :class:`ShuntedSelfAttention` does not support."""
    check_heads(embed_dims, num_heads)
    if sr_ratio < 1 or (sr_ratio > 1 and sr_ratio % 2):
        raise ValueError(
            f'sr_ratio={sr_ratio} does not fit; expected 1 or an even number, since the second scale is sr_ratio / 2'
        )
    if sr_ratio > 1 and num_heads % 2:
        raise ValueError(
            f'num_heads={num_heads} is odd, but sr_ratio={sr_ratio} splits the heads over two scales; '
            'use an even number of heads, or sr_ratio=1'
        )

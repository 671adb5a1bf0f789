"""Self-attention inside windows, regular or shifted, with a relative position bias.

Source: Liu et al., Swin Transformer, https://arxiv.org/abs/2103.14030, section 3.2. Fields and state dict are those of
MMDetection's ``ShiftWindowMSA``.
"""

import torch
from mmdet.models.backbones.swin import ShiftWindowMSA
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.layers.token_layout import check_heads, check_tokens
from msda_plugin.registry import MODELS

# Added to the scores of pixels in the same window that come from different sides of the map.
OTHER_REGION = -100.0


@MODELS.register_module()
class ShiftedWindowAttention(ShiftWindowMSA):
    """Self-attention inside each window: W-MSA, or SW-MSA with a ``shift_size``.

    The map is padded with zeros, at the bottom and on the right, to a multiple of the window. As in the authors' code,
    padded pixels take part in the attention. The attention is computed by scaled_dot_product_attention. Only windows at
    the last row and column need a mask, so the mask of all windows is never stored.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: number of heads.
        window_size: side of the window, in pixels.
        shift_size: shift of the windows to the bottom right, in pixels, 0 (W-MSA) to ``window_size`` - 1; Swin's SW-MSA
            uses ``window_size // 2``.
        qkv_bias: whether the query, key and value projection has a bias.
        qk_scale: scale of the scores; None: head_dim ** -0.5.
        attn_drop_rate: dropout of the attention weights, 0-1.
        proj_drop_rate: dropout of the projected output, 0-1.
        dropout_layer: config of the dropout layer of the output; None: no dropout.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or ``shift_size`` is not less than ``window_size``.

    Example:
        >>> layer = ShiftedWindowAttention(32, num_heads=4, window_size=7, shift_size=3)
        >>> layer(torch.rand(2, 10 * 13, 32), (10, 13)).shape
        torch.Size([2, 130, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        dropout_layer: dict | None = None,
        init_cfg: dict | list | None = None,
    ):
        check_heads(embed_dims, num_heads)
        if window_size < 1 or not 0 <= shift_size < window_size:
            raise ValueError(
                f'shift_size={shift_size} does not fit window_size={window_size}; expected window_size of at '
                'least 1 and shift_size from 0 to window_size - 1, usually 0 or window_size // 2'
            )
        super().__init__(
            embed_dims,
            num_heads,
            window_size,
            shift_size,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop_rate=attn_drop_rate,
            proj_drop_rate=proj_drop_rate,
            dropout_layer=dropout_layer or dict(type='DropPath', drop_prob=0.0),
            init_cfg=init_cfg,
        )
        self.embed_dims = embed_dims
        self.num_heads = num_heads

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend.

        Args:
            query: tokens (B, H * W, C), row by row.
            hw_shape: (H, W), of any size.

        Returns:
            Tokens (B, H * W, C), without residual connection.

        Raises:
            ValueError: If the tokens do not match ``hw_shape`` or ``embed_dims``.
        """
        check_tokens(self, query, hw_shape)
        (height, width), window, shift = hw_shape, self.window_size, self.shift_size
        x = query.unflatten(1, hw_shape)
        if height % window or width % window:
            x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        qkv = self.w_msa.qkv(x).unflatten(3, (3, self.num_heads, -1)).unflatten(2, (-1, window))
        # (B, rows, window, columns, window, 3, heads, D) -> (3, B, rows, columns, heads, window, window, D)
        qkv = qkv.unflatten(1, (-1, window)).permute(5, 0, 1, 3, 6, 2, 4, 7)
        x = self._attend_shifted(qkv) if shift else self._attend(qkv, self._position_bias())
        # (B, rows, columns, heads, window, window, D) -> (B, padded H, padded W, C)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        if shift:
            x = x.roll((shift, shift), dims=(1, 2))
        x = x[:, :height, :width].flatten(1, 2)
        return self.drop(self.w_msa.proj_drop(self.w_msa.proj(x)))

    def _attend_shifted(self, qkv: Tensor) -> Tensor:
        """:meth:`_attend` with masks for the last row and column of windows, which mix two sides of the map."""
        bias = self._position_bias()
        rows = []
        for row_windows, last_row in _split_last(qkv, 2):
            parts = [
                self._attend(windows, bias + self._region_bias(bias, last_row, last_column))
                for windows, last_column in _split_last(row_windows, 3)
            ]
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows, 1)

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attend inside each window.

        Args:
            qkv: (3, B, rows, columns, heads, window, window, D).
            bias: (heads, window ** 2, window ** 2), added to the scores.

        Returns:
            (B, rows, columns, heads, window, window, D).
        """
        query, key, value = qkv.flatten(5, 6).flatten(1, 3)
        dropout = self.w_msa.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, bias[None], dropout, scale=self.w_msa.scale)
        return out.view(qkv.shape[1:])

    def _position_bias(self) -> Tensor:
        """(heads, window ** 2, window ** 2): the table entry for each pair of pixels (query, key)."""
        index = self.w_msa.relative_position_index
        return self.w_msa.relative_position_bias_table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)

    def _region_bias(self, bias: Tensor, last_row: bool, last_column: bool) -> Tensor:
        """(window ** 2, window ** 2): ``OTHER_REGION`` for pairs from different sides of the map, else 0."""
        wrapped = torch.arange(self.window_size, device=bias.device) >= self.window_size - self.shift_size
        regions = ((wrapped & last_row).int()[:, None] + 2 * (wrapped & last_column).int()).flatten()
        return (regions[:, None] != regions).to(bias.dtype) * OTHER_REGION


def _split_last(windows: Tensor, dim: int) -> list[tuple[Tensor, bool]]:
    """Split off the last windows along ``dim``. Returns non-empty parts, each with whether it is the last."""
    inner = windows.shape[dim] - 1
    if not inner:
        return [(windows, True)]
    return list(zip(windows.split([inner, 1], dim), (False, True), strict=True))

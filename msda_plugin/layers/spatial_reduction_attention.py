"""Attention with keys and values from a spatially reduced map.

Sources: Wang et al., PVT, https://arxiv.org/abs/2102.12122, section 3.3 (spatial-reduction attention, the same in PVT
v2), and PVT v2, https://arxiv.org/abs/2106.13797, section 3.2 (linear spatial-reduction attention). Fields and state
dict are those of MMDetection's ``SpatialReductionAttention``.
"""

from mmcv.cnn import build_norm_layer
from mmdet.models.backbones.pvt import SpatialReductionAttention as MMDetSpatialReductionAttention
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

# Side of the map that linear SRA pools to.
POOL_SIZE = 7


@MODELS.register_module()
class SpatialReductionAttention(MMDetSpatialReductionAttention):
    """Every pixel attends to the pixels of a reduced map. The attention matrix is never stored.

    SRA merges windows of ``sr_ratio`` x ``sr_ratio`` pixels by a convolution and a norm. Rows and columns that do not
    fill a window are ignored, and a side shorter than a window is padded with zeros. Linear SRA pools any map to 7 x 7
    before a 1 x 1 convolution, a norm and a GELU, so its cost is linear in the number of pixels.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: number of heads.
        attn_drop: dropout of the attention weights, 0-1.
        proj_drop: dropout of the projected output, 0-1.
        dropout_layer: config of the dropout layer before the identity is added; None: no dropout.
        qkv_bias: whether the projections have a bias, as in MMDetection including the output projection.
        norm_cfg: config of the norm after the reduction; None: ``dict(type='LN')``.
        sr_ratio: side of the merged window; 1: no reduction. Ignored by linear SRA, as in PVT v2.
        linear: use linear SRA.
        add_identity: add ``identity`` to the result, as in MMDetection.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or ``sr_ratio`` is less than 1.

    Example:
        >>> layer = SpatialReductionAttention(32, num_heads=4, sr_ratio=4)
        >>> layer(torch.rand(2, 10 * 13, 32), (10, 13)).shape
        torch.Size([2, 130, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dropout_layer: dict | None = None,
        qkv_bias: bool = True,
        norm_cfg: dict | None = None,
        sr_ratio: int = 1,
        linear: bool = False,
        add_identity: bool = True,
        init_cfg: dict | list | None = None,
    ):
        check_heads(embed_dims, num_heads)
        if sr_ratio < 1:
            raise ValueError(f'sr_ratio={sr_ratio} does not fit; expected 1 (no reduction) or more')
        norm_cfg = norm_cfg or dict(type='LN')
        super().__init__(
            embed_dims,
            num_heads,
            attn_drop,
            proj_drop,
            dropout_layer,
            qkv_bias=qkv_bias,
            norm_cfg=norm_cfg,
            sr_ratio=1 if linear else sr_ratio,
            init_cfg=init_cfg,
        )
        self.linear = linear
        self.add_identity = add_identity
        if linear:
            self.sr = nn.Conv2d(embed_dims, embed_dims, 1)
            self.norm = build_norm_layer(norm_cfg, embed_dims)[1]

    def forward(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        identity: Tensor | None = None,
        key: Tensor | None = None,
        key_hw_shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: the queries, tokens (B, H * W, C), row by row.
            hw_shape: (H, W), of any size.
            identity: added to the result, (B, H * W, C); None: ``x``.
            key: tokens (B, h * w, C) of another map, for cross-attention; None: ``x``.
            key_hw_shape: (h, w) of the other map, of any size.

        Returns:
            Tokens (B, H * W, C).

        Raises:
            ValueError: If tokens do not match their map shape or ``embed_dims``, or only one of ``key`` and
                ``key_hw_shape`` is given.
        """
        check_tokens(self, x, hw_shape)
        if (key is None) != (key_hw_shape is None):
            raise ValueError(
                f'key_hw_shape is {key_hw_shape}, but key is {"None" if key is None else "a tensor"}: '
                'give both, or neither for self-attention'
            )
        if key is None:
            key, key_hw_shape = x, hw_shape
        else:
            check_tokens(self, key, key_hw_shape)
        identity = x if identity is None else identity

        dims, attn = self.embed_dims, self.attn
        query_weight, key_value_weight = attn.in_proj_weight.split([dims, 2 * dims])
        query_bias, key_value_bias = (
            (None, None) if attn.in_proj_bias is None else (attn.in_proj_bias.split([dims, 2 * dims]))
        )
        query = F.linear(x, query_weight, query_bias)
        key, value = F.linear(self._reduce(key, key_hw_shape), key_value_weight, key_value_bias).chunk(2, -1)
        query, key, value = (split_heads(t, self.num_heads) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=attn.dropout if self.training else 0.0)
        out = attn.out_proj(merge_heads(out))
        out = self.dropout_layer(self.proj_drop(out))
        return identity + out if self.add_identity else out

    def _reduce(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) -> tokens (B, M, C) of the reduced map."""
        if self.linear:
            x = self.sr(F.adaptive_avg_pool2d(tokens_to_map(x, hw_shape), POOL_SIZE))
            return F.gelu(self.norm(map_to_tokens(x)))
        if self.sr_ratio == 1:
            return x
        x = tokens_to_map(x, hw_shape)
        if min(hw_shape) < self.sr_ratio:
            missing = [max(self.sr_ratio - side, 0) for side in hw_shape]
            x = F.pad(x, (0, missing[1], 0, missing[0]))
        return self.norm(map_to_tokens(self.sr(x)))

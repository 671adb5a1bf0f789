"""Attention whose keys and values come from a spatially reduced map.

Sources: Wang et al., PVT, https://arxiv.org/abs/2102.12122, section 3.3 (spatial-reduction attention, the same in PVT
v2), and PVT v2, https://arxiv.org/abs/2106.13797, section 3.2 (linear spatial-reduction attention). Fields and state
dict are those of MMDetection's ``SpatialReductionAttention``.
"""

from mmcv.cnn import build_norm_layer
from mmdet.models.backbones.pvt import SpatialReductionAttention as MMDetSpatialReductionAttention
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS

from .token_layout import check_heads, check_tokens, map_to_tokens, tokens_to_map

# Side of the map that linear SRA pools to.
POOL_SIZE = 7


@MODELS.register_module()
class SpatialReductionAttention(MMDetSpatialReductionAttention):
    """Every pixel attends to the pixels of a reduced map; the scores of queries against keys are never held in memory.

    SRA merges ``sr_ratio`` x ``sr_ratio`` pixels by a convolution and a norm; rows and columns that do not fill such a
    window are left out, and a side shorter than it is padded with zeros to one window. Linear SRA pools any map to
    7 x 7 before a 1 x 1 convolution, a norm and a GELU, so that its cost grows with the number of pixels alone.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: heads.
        attn_drop: dropout of the attention weights, 0-1.
        proj_drop: dropout of the projected output, 0-1.
        dropout_layer: config of what the output passes before the identity is added; None: nothing.
        qkv_bias: whether the projections (as in MMDetection the last one too) have a bias.
        norm_cfg: config of the norm after the reduction; None: ``dict(type='LN')``.
        sr_ratio: side of the merged window; 1: no reduction. Without effect in linear SRA, as in PVT v2.
        linear: linear SRA.
        add_identity: whether the result is added to the input (to ``identity``), as in MMDetection.
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: sizes do not fit one another.

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
            identity: what the result is added to, (B, H * W, C); None: ``x``.
            key: tokens (B, h * w, C) of another map, which is reduced and attended to; None: ``x``.
            key_hw_shape: (h, w) of that map, of any size.

        Returns:
            Tokens (B, H * W, C).

        Raises:
            ValueError: tokens do not match their shape or ``embed_dims``, or one of ``key`` and ``key_hw_shape`` is
                missing.
        """
        check_tokens(self, x, hw_shape)
        if (key is None) != (key_hw_shape is None):
            raise ValueError(
                f'key_hw_shape is {key_hw_shape}, but key is {"None" if key is None else "a tensor"}: '
                'give both, or none for self-attention'
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
        # (B, N, C) -> (B, heads, N, C / heads)
        query, key, value = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=attn.dropout if self.training else 0.0)
        out = attn.out_proj(out.transpose(1, 2).flatten(2))
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

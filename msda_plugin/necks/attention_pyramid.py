"""Base class of PVTNeck and SwinNeck: a ChannelMapper with attention blocks and a top-down fusion."""

from collections.abc import Callable, Sequence

from mmcv.cnn.bricks.scale import LayerScale
from mmdet.models.necks import ChannelMapper
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.layer_norm_2d import LayerNorm2d
from msda_plugin.layers.mix_feed_forward import MixFeedForward
from msda_plugin.layers.spatial_reduction_attention import SpatialReductionAttention
from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map
from msda_plugin.layers.transformer_parts import run_layer

NORM_CFG = dict(type='GN', num_groups=32)
INIT_CFG = [
    dict(type='Xavier', layer='Conv2d', distribution='uniform'),
    dict(type='TruncNormal', layer='Linear', std=0.02),
]


class AttentionBlock(BaseModule):
    """x + scale1 * attention(norm1(x)), then x + scale2 * ffn(norm2(x)).

    Args:
        attention: maps tokens (B, H * W, C) and (H, W) to tokens, without a residual connection.
        ffn: the same.
        dims: channels C.
        scale: initial value of the layer scales.
    """

    def __init__(self, attention: nn.Module, ffn: nn.Module, dims: int, scale: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dims)
        self.attn = attention
        self.scale1 = LayerScale(dims, scale=scale)
        self.norm2 = nn.LayerNorm(dims)
        self.ffn = ffn
        self.scale2 = LayerScale(dims, scale=scale)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) of a map of ``hw_shape`` (H, W) -> tokens (B, H * W, C)."""
        x = x + self.scale1(self.attn(self.norm1(x), hw_shape))
        return x + self.scale2(self.ffn(self.norm2(x), hw_shape))


class AddFusion(BaseModule):
    """Adds the coarser map, upsampled (nearest neighbor) and scaled, to the finer one, as in an FPN."""

    def __init__(self, dims: int, scale: float):
        super().__init__()
        self.scale = LayerScale(dims, data_format='channels_first', scale=scale)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Maps (B, C, H, W) and (B, C, h, w) -> map (B, C, H, W)."""
        return fine + self.scale(F.interpolate(coarse, size=fine.shape[2:]))


class CrossAttentionFusion(BaseModule):
    """Adds cross-attention from the pixels of the finer map to the spatially reduced coarser map."""

    def __init__(self, dims: int, num_heads: int, sr_ratio: int, scale: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dims)
        self.key_norm = nn.LayerNorm(dims)
        self.attn = SpatialReductionAttention(dims, num_heads, sr_ratio=sr_ratio, add_identity=False)
        self.scale = LayerScale(dims, scale=scale)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Maps (B, C, H, W) and (B, C, h, w) -> map (B, C, H, W)."""
        hw_shape = tuple(fine.shape[2:])
        x = map_to_tokens(fine)
        out = self.attn(
            self.query_norm(x), hw_shape, key=self.key_norm(map_to_tokens(coarse)), key_hw_shape=tuple(coarse.shape[2:])
        )
        return tokens_to_map(x + self.scale(out), hw_shape)


class AttentionPyramid(ChannelMapper):
    """A :class:`ChannelMapper` whose maps are refined from the coarsest to the finest.

    Each map that has an input is fused with the next coarser one and passes ``depth`` attention blocks. Extra levels
    are those of the ChannelMapper. Every branch has a layer scale that starts at zero, so a new neck computes the same
    as a ChannelMapper with its weights.

    Args:
        in_channels: channels of each input map, finest first.
        out_channels: channels C of every output map.
        num_outs: number of output maps; None: one per input. Maps beyond the inputs are computed by 3x3 convolutions
            of stride 2 from the last input.
        depth: attention blocks per map.
        build_attention: builds the attention of a block from the reduction ratio of its map and the block's index; the
            attention maps tokens (B, H * W, C) and (H, W) to tokens, without a residual connection.
        use_conv: whether the feed-forward layers have PVT v2's convolution.
        num_heads: heads of every attention.
        mlp_ratio: hidden channels of the feed-forward layers, as a multiple of ``out_channels``.
        fusion: 'add', 'cross_attention' or None.
        sr_ratios: spatial reduction of each input map in global attention; None: 1 for the last map, doubled for each
            finer one, which is PVT's 8, 4, 2, 1 at strides 4, 8, 16, 32.
        input_norm: apply a LayerNorm to each input, for backbones that do not normalize their outputs (PVT v1).
        layer_scale_init_value: initial value of all layer scales.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        kernel_size, norm_cfg, act_cfg, bias: of the convolutions, as in ChannelMapper.
        init_cfg: MMEngine's initialization config; None: :data:`INIT_CFG`.

    Raises:
        ValueError: If the arguments do not fit together.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int | None,
        *,
        depth: int,
        build_attention: Callable[[int, int], nn.Module],
        use_conv: bool,
        num_heads: int,
        mlp_ratio: float,
        fusion: str | None,
        sr_ratios: Sequence[int] | None,
        input_norm: bool,
        layer_scale_init_value: float,
        with_cp: bool,
        kernel_size: int,
        norm_cfg: dict | None,
        act_cfg: dict | None,
        bias: bool | str,
        init_cfg: dict | list | None,
    ):
        self._check_config(in_channels, out_channels, num_outs, depth, num_heads, fusion, sr_ratios, norm_cfg)
        super().__init__(
            list(in_channels),
            out_channels,
            kernel_size,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            bias=bias,
            num_outs=num_outs,
            init_cfg=init_cfg or INIT_CFG,
        )
        num_levels, scale = len(in_channels), layer_scale_init_value
        sr_ratios = sr_ratios or [2**level for level in reversed(range(num_levels))]
        self.in_channels = tuple(in_channels)
        self.with_cp = with_cp
        self.input_norms = ModuleList([LayerNorm2d(channels) for channels in in_channels] if input_norm else [])
        self.blocks = ModuleList(
            [
                ModuleList(
                    [
                        AttentionBlock(
                            build_attention(sr_ratio, index),
                            MixFeedForward(out_channels, int(out_channels * mlp_ratio), use_conv),
                            out_channels,
                            scale,
                        )
                        for index in range(depth)
                    ]
                )
                for sr_ratio in sr_ratios
            ]
        )
        # fusions[i] fuses map i + 1 into map i.
        if fusion == 'cross_attention':
            self.fusions = ModuleList(
                [CrossAttentionFusion(out_channels, num_heads, sr_ratio, scale) for sr_ratio in sr_ratios[1:]]
            )
        else:
            self.fusions = ModuleList([AddFusion(out_channels, scale) for _ in sr_ratios[1:]] if fusion else [])

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, in_channels[i], H_i, W_i) of any size, finest first -> ``num_outs`` maps of ``out_channels``.

        Output i has the size of input i; an extra level has half the sides of the previous one, rounded up.

        Raises:
            ValueError: If the number of maps or their channels differ from ``in_channels``.
        """
        channels = tuple(x.shape[1] for x in inputs)
        if channels != self.in_channels:
            raise ValueError(
                f'{type(self).__name__} got {len(channels)} maps of {channels} channels; expected '
                f'{len(self.in_channels)} maps of in_channels={self.in_channels}: set in_channels to the channels '
                "of the backbone's maps, or select the maps with its out_indices"
            )
        if self.input_norms:
            inputs = [norm(x) for norm, x in zip(self.input_norms, inputs, strict=True)]
        outs = list(super().forward(inputs))
        for i in reversed(range(len(inputs))):
            if self.fusions and i + 1 < len(inputs):
                outs[i] = self.fusions[i](outs[i], outs[i + 1])
            if self.blocks[i]:
                outs[i] = self._refine(outs[i], self.blocks[i])
        return tuple(outs)

    def _refine(self, x: Tensor, blocks: ModuleList) -> Tensor:
        """Map (B, C, H, W) -> map (B, C, H, W)."""
        hw_shape = tuple(x.shape[2:])
        x = map_to_tokens(x)
        for block in blocks:
            x = run_layer(block, self.with_cp and self.training, x=x, hw_shape=hw_shape)
        return tokens_to_map(x, hw_shape)

    @classmethod
    def _check_config(
        cls,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int | None,
        depth: int,
        num_heads: int,
        fusion: str | None,
        sr_ratios: Sequence[int] | None,
        norm_cfg: dict | None,
    ) -> None:
        name = cls.__name__
        if not isinstance(in_channels, Sequence) or not in_channels:
            raise ValueError(
                f'{name} got in_channels={in_channels}; expected the channels of each map of the backbone, such as '
                '[256, 512, 1024, 2048]'
            )
        if num_outs is not None and num_outs < len(in_channels):
            raise ValueError(
                f'{name} got num_outs={num_outs}, but there are {len(in_channels)} in_channels {list(in_channels)}: '
                'raise num_outs, or shorten in_channels and out_indices of the backbone'
            )
        if depth < 0:
            raise ValueError(f'{name} got depth={depth}; expected 0 (no attention) or more')
        if num_heads < 1 or out_channels % num_heads:
            raise ValueError(
                f'{name} got out_channels={out_channels}, which is not a multiple of num_heads='
                f'{num_heads}: change one of them'
            )
        if norm_cfg and norm_cfg['type'] == 'GN' and out_channels % norm_cfg['num_groups']:
            raise ValueError(
                f'{name} got out_channels={out_channels}, which is not a multiple of the '
                f'{norm_cfg["num_groups"]} groups of norm_cfg: change one of them'
            )
        if fusion not in (None, 'add', 'cross_attention'):
            raise ValueError(f"{name} got fusion={fusion!r}; expected 'add', 'cross_attention' or None")
        if sr_ratios is not None and len(sr_ratios) != len(in_channels):
            raise ValueError(
                f'{name} got {len(sr_ratios)} sr_ratios {list(sr_ratios)}; expected one for each of the '
                f'{len(in_channels)} in_channels {list(in_channels)}, or None'
            )

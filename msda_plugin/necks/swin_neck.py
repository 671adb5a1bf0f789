"""A feature pyramid fused by shifted-window attention.

The attention and the feed-forward layer are those of Swin Transformer (Liu et al., https://arxiv.org/abs/2103.14030).
"""

from collections.abc import Sequence

from msda_plugin.layers.shifted_window_attention import ShiftedWindowAttention
from msda_plugin.registry import MODELS

from .attention_pyramid import NORM_CFG, AttentionPyramid


@MODELS.register_module()
class SwinNeck(AttentionPyramid):
    """Takes the place of ChannelMapper or FPN; each map passes shifted-window attention and a top-down fusion.

    A new neck gives what a ChannelMapper of its weights gives; see :class:`AttentionPyramid` for the order of things.

    Args:
        in_channels: channels of each input map, finest first.
        out_channels: channels of every output map; a multiple of ``num_heads`` and of the norm's groups.
        num_outs: number of output maps; None: one an input. What is more than the inputs is made by 3x3 convolutions
            of stride 2, from the last input.
        depth: attention blocks on each map; even, because regular windows and windows shifted by half take turns; 0:
            none.
        num_heads: heads.
        window_size: side of the windows, in pixels of the map.
        mlp_ratio: hidden channels of the feed-forward layers, in units of ``out_channels``.
        fusion: 'add' (the coarser map is enlarged and added), 'cross_attention' (the finer map attends to the coarser
            one, reduced by its ``sr_ratios``), or None.
        sr_ratios: spatial reduction of each input map in the cross-attention; None: 1 for the last, twice as much for
            each one before.
        input_norm: give each input a LayerNorm, for backbones that do not normalise their outputs.
        layer_scale_init_value: initial value of the layer scales; above zero the attention acts from the first step.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        kernel_size, norm_cfg, act_cfg, bias: the convolutions', as in ChannelMapper; ``norm_cfg`` None: no norm.
        init_cfg: MMEngine's initialisation config; None: Xavier for convolutions, truncated normal for linear layers.

    Raises:
        ValueError: sizes do not fit one another.

    Example:
        >>> neck = SwinNeck([64, 128, 256], out_channels=64, num_outs=4)
        >>> outs = neck([torch.rand(1, 64, 28, 20), torch.rand(1, 128, 14, 10), torch.rand(1, 256, 7, 5)])
        >>> [tuple(x.shape) for x in outs]
        [(1, 64, 28, 20), (1, 64, 14, 10), (1, 64, 7, 5), (1, 64, 4, 3)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        depth: int = 2,
        num_heads: int = 8,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        fusion: str | None = 'add',
        sr_ratios: Sequence[int] | None = None,
        input_norm: bool = False,
        layer_scale_init_value: float = 0.0,
        with_cp: bool = False,
        kernel_size: int = 1,
        norm_cfg: dict | None = NORM_CFG,
        act_cfg: dict | None = None,
        bias: bool | str = True,
        init_cfg: dict | list | None = None,
    ):
        if depth % 2:
            raise ValueError(
                f'SwinNeck got depth={depth}; expected an even number of blocks, because regular and '
                'shifted windows take turns'
            )

        def build_attention(sr_ratio: int, number: int) -> ShiftedWindowAttention:
            return ShiftedWindowAttention(
                out_channels, num_heads, window_size, shift_size=window_size // 2 if number % 2 else 0
            )

        super().__init__(
            in_channels,
            out_channels,
            num_outs,
            depth=depth,
            build_attention=build_attention,
            use_conv=False,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            fusion=fusion,
            sr_ratios=sr_ratios,
            input_norm=input_norm,
            layer_scale_init_value=layer_scale_init_value,
            with_cp=with_cp,
            kernel_size=kernel_size,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            bias=bias,
            init_cfg=init_cfg,
        )

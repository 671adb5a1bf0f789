"""Feature pyramid with spatial-reduction attention.

The attention and the feed-forward layer are those of PVT v2 (Wang et al., https://arxiv.org/abs/2106.13797).
"""

from collections.abc import Sequence

from msda_plugin.layers.spatial_reduction_attention import SpatialReductionAttention
from msda_plugin.necks.attention_pyramid import NORM_CFG, AttentionPyramid
from msda_plugin.registry import MODELS


@MODELS.register_module()
class PVTNeck(AttentionPyramid):
    """ChannelMapper with spatial-reduction attention on each map and a top-down fusion.

    A drop-in replacement for ChannelMapper or FPN. A new neck computes the same as a ChannelMapper with its weights;
    see :class:`AttentionPyramid` for the order of the steps.

    Args:
        in_channels: channels of each input map, finest first.
        out_channels: channels of every output map; a multiple of ``num_heads`` and of the norm's groups.
        num_outs: number of output maps; None: one per input. Maps beyond the inputs are computed by 3x3 convolutions
            of stride 2 from the last input.
        depth: attention blocks per map; 0: none.
        num_heads: attention heads.
        mlp_ratio: hidden channels of the feed-forward layers, as a multiple of ``out_channels``.
        sr_ratios: spatial reduction of each input map; None: 1 for the last map, doubled for each finer one, which is
            PVT's 8, 4, 2, 1 at strides 4, 8, 16, 32.
        linear: use linear spatial-reduction attention in the blocks.
        fusion: 'add' (the coarser map is upsampled and added), 'cross_attention' (the finer map attends to the coarser
            one, reduced by the coarser map's ``sr_ratios``), or None.
        input_norm: apply a LayerNorm to each input, for backbones that do not normalize their outputs (PVT v1).
        layer_scale_init_value: initial value of the layer scales; with 0 the attention contributes nothing at first.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        kernel_size, norm_cfg, act_cfg, bias: of the convolutions, as in ChannelMapper; ``norm_cfg`` None: no norm.
        init_cfg: MMEngine's initialization config; None: Xavier for convolutions, truncated normal for linear layers.

    Raises:
        ValueError: If the arguments do not fit together.

    Example:
        >>> neck = PVTNeck([64, 128, 256], out_channels=64, num_outs=4)
        >>> outs = neck([torch.rand(1, 64, 28, 20), torch.rand(1, 128, 14, 10), torch.rand(1, 256, 7, 5)])
        >>> [tuple(x.shape) for x in outs]
        [(1, 64, 28, 20), (1, 64, 14, 10), (1, 64, 7, 5), (1, 64, 4, 3)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        depth: int = 1,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        sr_ratios: Sequence[int] | None = None,
        linear: bool = False,
        fusion: str | None = 'add',
        input_norm: bool = False,
        layer_scale_init_value: float = 0.0,
        with_cp: bool = False,
        kernel_size: int = 1,
        norm_cfg: dict | None = NORM_CFG,
        act_cfg: dict | None = None,
        bias: bool | str = True,
        init_cfg: dict | list | None = None,
    ):
        def build_attention(sr_ratio: int, index: int) -> SpatialReductionAttention:
            return SpatialReductionAttention(
                out_channels, num_heads, sr_ratio=sr_ratio, linear=linear, add_identity=False
            )

        super().__init__(
            in_channels,
            out_channels,
            num_outs,
            depth=depth,
            build_attention=build_attention,
            use_conv=True,
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

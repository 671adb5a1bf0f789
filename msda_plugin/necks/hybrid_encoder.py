"""The hybrid encoder of RT-DETR and D-FINE: attention on the coarsest map, then fusion of the scales by convolutions.

Sources: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", https://arxiv.org/abs/2304.08069, section 4.2;
Peng et al., D-FINE, https://arxiv.org/abs/2410.13842.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.detr_layers import DetrTransformerEncoderLayer
from msda_plugin.layers.rep_vgg import BATCH_NORM, SILU, CSPRepLayer, RepNCSPELAN4, RepVGGBlock
from msda_plugin.layers.token_layout import check_heads, map_to_tokens, tokens_to_map
from msda_plugin.registry import MODELS

GELU = dict(type='GELU')
VARIANTS = ('rtdetr', 'dfine')


@MODELS.register_module()
class HybridEncoder(BaseModule):
    """The neck of RT-DETR (``variant='rtdetr'``) and of D-FINE and DEIM (``variant='dfine'``).

    A 1x1 convolution projects each map. Encoder layers attend over the pixels of the chosen maps. A top-down and a
    bottom-up pass then fuse neighboring maps.

    Args:
        in_channels: channels of each map of the backbone, finest first; at least two maps, each half as large as the
            one before it, rounded up.
        out_channels: channels of every output map; a multiple of 4 and of ``num_heads``.
        variant: 'rtdetr' fuses by :class:`CSPRepLayer` and halves maps by a 3x3 convolution; 'dfine' fuses by
            :class:`RepNCSPELAN4` and halves maps by a 1x1 and a depthwise 3x3 convolution.
        num_encoder_layers: encoder layers on each map of ``encoder_levels``; 0: none.
        encoder_levels: indices of the maps with encoder layers.
        num_heads: attention heads of the encoder layers.
        feedforward_channels: hidden channels of the encoder layers.
        dropout: dropout rate of the encoder layers.
        encoder_act_cfg: activation of the encoder layers.
        num_blocks: RepVGG blocks of each CSP layer.
        expansion: width of the fusion blocks, as a multiple of ``out_channels``.
        norm_cfg, act_cfg: norm and activation of the convolutions.
        init_cfg: as in MMEngine.

    Raises:
        ValueError: If the arguments do not fit together.

    Example:
        >>> neck = HybridEncoder((64, 128, 256), 64, num_heads=4)
        >>> maps = [torch.rand(1, c, 80 // s, 112 // s) for c, s in ((64, 1), (128, 2), (256, 4))]
        >>> [tuple(x.shape) for x in neck(maps)]
        [(1, 64, 80, 112), (1, 64, 40, 56), (1, 64, 20, 28)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        variant: str = 'rtdetr',
        num_encoder_layers: int = 1,
        encoder_levels: Sequence[int] = (-1,),
        num_heads: int = 8,
        feedforward_channels: int = 1024,
        dropout: float = 0.0,
        encoder_act_cfg: dict = GELU,
        num_blocks: int = 3,
        expansion: float = 1.0,
        norm_cfg: dict = BATCH_NORM,
        act_cfg: dict = SILU,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if variant not in VARIANTS:
            raise ValueError(f'variant is {variant!r}; expected one of {VARIANTS}')
        if isinstance(in_channels, int) or len(in_channels) < 2:
            raise ValueError(
                f'in_channels is {in_channels}; expected the channels of at least two maps, finest first: set '
                'out_indices of the backbone to two or more of its stages'
            )
        if num_encoder_layers < 0 or num_blocks < 0 or feedforward_channels < 1 or int(expansion * out_channels) < 2:
            raise ValueError(
                f'num_encoder_layers={num_encoder_layers}, num_blocks={num_blocks}, feedforward_channels='
                f'{feedforward_channels} and expansion={expansion}; expected at least 0, 0 and 1, and at least 2 '
                f'of the out_channels={out_channels} after expansion'
            )
        levels = len(in_channels)
        if isinstance(encoder_levels, int):
            raise ValueError(f'encoder_levels is {encoder_levels}; expected a sequence of indices, such as (-1,)')
        if not all(-levels <= level < levels for level in encoder_levels):
            raise ValueError(
                f'encoder_levels is {tuple(encoder_levels)}, but there are {levels} maps: use indices from 0 to '
                f'{levels - 1}, or -1 for the coarsest map'
            )
        check_heads(out_channels, num_heads)
        if out_channels % 4:
            raise ValueError(f'out_channels={out_channels} is not a multiple of 4, as position embeddings need')
        self.in_channels = tuple(in_channels)
        self.out_channels = out_channels
        self.num_outs = levels
        self.encoder_levels = tuple(level % levels for level in encoder_levels)

        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        linear = dict(norm_cfg=norm_cfg, act_cfg=None)
        self.input_proj = ModuleList([ConvModule(channels, out_channels, 1, **linear) for channels in in_channels])
        self.encoder = ModuleList(
            [
                ModuleList(
                    [
                        DetrTransformerEncoderLayer(
                            self_attn_cfg=dict(
                                embed_dims=out_channels,
                                num_heads=num_heads,
                                attn_drop=dropout,
                                dropout_layer=dict(type='Dropout', drop_prob=dropout),
                                batch_first=True,
                            ),
                            ffn_cfg=dict(
                                embed_dims=out_channels,
                                feedforward_channels=feedforward_channels,
                                ffn_drop=dropout,
                                act_cfg=encoder_act_cfg,
                            ),
                        )
                        for _ in range(num_encoder_layers)
                    ]
                )
                for _ in encoder_levels
            ]
        )

        def fusion() -> nn.Module:
            if variant == 'rtdetr':
                return CSPRepLayer(2 * out_channels, out_channels, num_blocks, expansion, **cfg)
            width = round(expansion * out_channels // 2)
            return RepNCSPELAN4(2 * out_channels, out_channels, 2 * out_channels, width, num_blocks, **cfg)

        def downsampling() -> nn.Module:
            if variant == 'rtdetr':
                return ConvModule(out_channels, out_channels, 3, stride=2, padding=1, **cfg)
            return nn.Sequential(
                ConvModule(out_channels, out_channels, 1, **linear),
                ConvModule(out_channels, out_channels, 3, stride=2, padding=1, groups=out_channels, **linear),
            )

        lateral = cfg if variant == 'rtdetr' else linear
        self.lateral_convs = ModuleList(
            [ConvModule(out_channels, out_channels, 1, **lateral) for _ in range(levels - 1)]
        )
        self.fpn_blocks = ModuleList([fusion() for _ in range(levels - 1)])
        self.downsample_convs = ModuleList([downsampling() for _ in range(levels - 1)])
        self.pan_blocks = ModuleList([fusion() for _ in range(levels - 1)])

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, in_channels[i], H_i, W_i), finest first -> maps (B, out_channels, H_i, W_i).

        Raises:
            ValueError: If the number, channels or sizes of the maps do not fit.
        """
        self._check(inputs)
        maps = [proj(x) for proj, x in zip(self.input_proj, inputs, strict=True)]
        for layers, level in zip(self.encoder, self.encoder_levels, strict=True):
            size = maps[level].shape[-2:]
            tokens = map_to_tokens(maps[level])
            position = sine_position_embedding(size, self.out_channels, tokens.device).to(tokens.dtype)
            for layer in layers:
                tokens = layer(tokens, position, None)
            maps[level] = tokens_to_map(tokens, size).contiguous()

        # Top-down: the lateral convolutions and the blocks are ordered from the coarsest map.
        fused = maps[-1:]
        for lateral, block, finer in zip(self.lateral_convs, self.fpn_blocks, maps[-2::-1], strict=True):
            fused[-1] = lateral(fused[-1])
            fused.append(block(torch.cat([F.interpolate(fused[-1], size=finer.shape[-2:]), finer], 1)))
        fused.reverse()
        outs = fused[:1]
        for downsample, block, coarser in zip(self.downsample_convs, self.pan_blocks, fused[1:], strict=True):
            outs.append(block(torch.cat([downsample(outs[-1]), coarser], 1)))
        return tuple(outs)

    def fuse(self) -> 'HybridEncoder':
        """Fold RepVGG branches and batch norms into plain convolutions, in place, for inference.

        The results are those of ``eval()``, up to rounding. The state dict has other keys afterwards, so load a
        checkpoint before.
        """
        for module in self.modules():
            if isinstance(module, RepVGGBlock):
                module.fuse()
        fuse_conv_bn(self)
        return self

    def _check(self, inputs: Sequence[Tensor]) -> None:
        channels = tuple(x.shape[1] for x in inputs)
        if channels != self.in_channels:
            raise ValueError(
                f'HybridEncoder got {len(channels)} maps of {channels} channels; expected maps of in_channels='
                f'{self.in_channels}: select the maps with out_indices of the backbone, or change in_channels'
            )
        sizes = [tuple(x.shape[-2:]) for x in inputs]
        for finer, coarser in zip(sizes, sizes[1:], strict=False):
            if coarser != ((finer[0] + 1) // 2, (finer[1] + 1) // 2):
                raise ValueError(
                    f'HybridEncoder got maps of sizes {sizes}; each map must be half as high and wide as the one '
                    'before it, rounded up: pad the images to a multiple of 32 (pad_size_divisor), or select the '
                    "backbone's maps of strides 8, 16 and 32"
                )


def sine_position_embedding(
    size: tuple[int, int], embed_dims: int, device: torch.device | str, temperature: float = 10000.0
) -> Tensor:
    """Sine position embedding of a map's pixels, row by row.

    For square maps it is the authors' embedding. Theirs orders the pixels of other maps by column.

    Args:
        size: (h, w) of the map.
        embed_dims: channels, a multiple of 4.
        temperature: base of the wavelengths.

    Returns:
        (1, h * w, embed_dims): sine and cosine of the row, then of the column.
    """
    omega = temperature ** -(torch.arange(embed_dims // 4, dtype=torch.float32, device=device) / (embed_dims // 4))
    rows, columns = (torch.arange(side, dtype=torch.float32, device=device)[:, None] * omega for side in size)
    rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, size[1], -1)
    columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(size[0], -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)[None]

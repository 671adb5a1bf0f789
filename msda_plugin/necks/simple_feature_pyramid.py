"""ViTDet's simple feature pyramid: all levels from the single map of a plain backbone.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
https://arxiv.org/abs/2203.16527, section 3, with the details of the authors' published code.
"""

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.layer_norm_2d import LayerNorm2d
from msda_plugin.registry import MODELS

SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Levels of strides 4, 8, 16 and 32, or some of them, from a map of stride 16, such as ``VisionTransformer``'s.

    The map is upsampled by transposed convolutions, kept, or max-pooled. Each level then passes a 1x1 and a 3x3
    convolution with LayerNorms.

    Args:
        in_channels: channels C of the input map.
        out_channels: channels of every output map.
        num_outs: number of output maps; None: one per scale factor. Maps beyond the scale factors take every second
            pixel of the previous map.
        scale_factors: sides of the levels, as multiples of the input's; some of 4, 2, 1 and 0.5, finest first.
        init_cfg: as in MMEngine; None: PyTorch's initialization, as in ViTDet.

    Raises:
        ValueError: If channels, scale factors and number of outputs do not fit together.

    Example:
        >>> neck = SimpleFeaturePyramid(192, num_outs=5)
        >>> [tuple(x.shape) for x in neck([torch.rand(1, 192, 5, 7)])]
        [(1, 256, 20, 28), (1, 256, 10, 14), (1, 256, 5, 7), (1, 256, 3, 4), (1, 256, 2, 2)]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int | None = None,
        scale_factors: Sequence[float] = SCALE_FACTORS,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg)
        scale_factors = tuple(scale_factors)
        if not scale_factors or scale_factors != tuple(s for s in SCALE_FACTORS if s in scale_factors):
            raise ValueError(f'scale_factors is {scale_factors}; expected some of {SCALE_FACTORS}, in this order')
        num_outs = len(scale_factors) if num_outs is None else num_outs
        if num_outs < len(scale_factors):
            raise ValueError(
                f'num_outs is {num_outs}, but there are {len(scale_factors)} scale_factors {scale_factors}: raise '
                'num_outs, or shorten scale_factors'
            )
        if not isinstance(in_channels, int) or in_channels < 4 or in_channels % 4:
            raise ValueError(
                f"in_channels is {in_channels}; expected one number, a multiple of 4: the channels of the backbone's "
                'single map'
            )
        self.in_channels = in_channels
        self.num_outs = num_outs
        self.levels = nn.ModuleList()
        for scale in scale_factors:
            layers, channels = _resize(in_channels, scale)
            self.levels.append(
                nn.Sequential(
                    *layers,
                    nn.Conv2d(channels, out_channels, 1, bias=False),
                    LayerNorm2d(out_channels),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                    LayerNorm2d(out_channels),
                )
            )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Sequence of one map (B, C, H, W) -> ``num_outs`` maps (B, out_channels, h, w), finest first.

        Sides are multiplied by the scale factor, and half sides are rounded up.

        Raises:
            ValueError: If there is not exactly one map of ``in_channels`` channels.
        """
        found = [x.shape[1] for x in inputs]
        if found != [self.in_channels]:
            raise ValueError(
                f'SimpleFeaturePyramid got {len(found)} maps of {found} channels; expected one map of in_channels='
                f'{self.in_channels}: select one map with out_indices of the backbone, and set in_channels to its '
                'channels'
            )
        outs = [level(inputs[0]) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


def _resize(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that multiply a map's sides by ``scale``, and their output channels."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(channels, channels // 2, 2, stride=2),
            LayerNorm2d(channels // 2),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, 2, stride=2),
        ], channels // 4
    if scale == 2:
        return [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)], channels // 2
    # Ceil mode keeps the last row of an odd side, so that the level covers the image.
    return [nn.MaxPool2d(2, stride=2, ceil_mode=True)] if scale < 1 else [], channels

"""The ResNet-vd of RT-DETR.

Source: He et al., "Bag of Tricks for Image Classification", https://arxiv.org/abs/1812.01187; the shortcut of the first
stage is that of PaddleDetection's ResNet-vd, from which RT-DETR's published weights come.
"""

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmdet.models.backbones import ResNetV1d
from mmdet.models.layers import ResLayer
from torch import Tensor, nn

from msda_plugin.backbones.published_backbone import PublishedBackbone, check_frozen_stages, check_image, check_indices
from msda_plugin.registry import MODELS


@MODELS.register_module()
class ResNetVD(PublishedBackbone, ResNetV1d):
    """MMDetection's ``ResNetV1d``, with a projection in the shortcut of every stage's first block.

    ResNet-18 and 34 differ from ``ResNetV1d`` in the first stage; deeper ones are the same. A ``Pretrained`` checkpoint
    is one of RT-DETR's authors, or has MMDetection's keys.

    Args:
        depth: 18, 34, 50, 101 or 152.
        zero_init_residual: start with residual branches of zero; RT-DETR does not.
        **kwargs: as for ``mmdet.ResNetV1d``. RT-DETR's ``freeze_norm`` is ``norm_eval=True`` with
            ``norm_cfg=dict(type='BN', requires_grad=False)``, its ``freeze_at`` is ``frozen_stages``.

    Attributes:
        out_channels: channels of each returned map.

    Raises:
        ValueError: If the depth is unknown, or an index is out of range.
    """

    family = 'rtdetr'
    _freeze_stages = ResNetV1d._freeze_stages

    def __init__(self, depth: int, zero_init_residual: bool = False, **kwargs) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f'depth is {depth!r}; expected one of {list(self.arch_settings)}')
        num_stages, out_indices = kwargs.get('num_stages', 4), kwargs.get('out_indices', (0, 1, 2, 3))
        check_indices('out_indices', sorted(out_indices), num_stages, 'stages')
        check_frozen_stages(kwargs.get('frozen_stages', -1), num_stages, 'stem', 'stages')
        super().__init__(depth=depth, zero_init_residual=zero_init_residual, **kwargs)
        self.in_channels = kwargs.get('in_channels', 3)
        self.out_channels = [self.feat_dim // 2 ** (self.num_stages - 1 - i) for i in sorted(self.out_indices)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> one map (B, C_i, H_i, W_i) per entry of ``out_indices``.

        Raises:
            ValueError: If the channels differ from ``in_channels``.
        """
        check_image('ResNetVD', x, self.in_channels)
        return super().forward(x)

    def make_res_layer(self, **kwargs) -> ResLayer:
        """Build a stage."""
        stage = super().make_res_layer(**kwargs)
        if stage[0].downsample is None:
            channels = kwargs['planes'] * kwargs['block'].expansion
            stage[0].downsample = nn.Sequential(
                nn.Identity(),  # the place of the pooling in the other stages
                build_conv_layer(kwargs['conv_cfg'], kwargs['inplanes'], channels, kernel_size=1, bias=False),
                build_norm_layer(kwargs['norm_cfg'], channels)[1],
            )
        return stage

"""The ResNet-vd of RT-DETR.

Source: He et al., "Bag of Tricks for Image Classification", https://arxiv.org/abs/1812.01187; the shortcut of the first
stage is that of PaddleDetection's ResNet-vd, from which RT-DETR's published weights come.
"""

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmdet.models.backbones import ResNetV1d
from mmdet.models.layers import ResLayer
from torch import nn

from msda_plugin.backbones.published_backbone import PublishedBackbone
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
        ValueError: If the depth is unknown.
    """

    family = 'rtdetr'
    _freeze_stages = ResNetV1d._freeze_stages

    def __init__(self, depth: int, zero_init_residual: bool = False, **kwargs) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f'depth is {depth}; expected one of {list(self.arch_settings)}')
        super().__init__(depth=depth, zero_init_residual=zero_init_residual, **kwargs)
        self.out_channels = [self.feat_dim // 2 ** (self.num_stages - 1 - i) for i in sorted(self.out_indices)]

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

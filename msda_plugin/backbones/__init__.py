"""Backbones: images to feature maps."""

from msda_plugin.backbones.dat import DAT
from msda_plugin.backbones.hgnetv2 import HGNetV2
from msda_plugin.backbones.resnet_vd import ResNetVD
from msda_plugin.backbones.shunted_transformer import ShuntedTransformer
from msda_plugin.backbones.vision_transformer import VisionTransformer

__all__ = ['DAT', 'HGNetV2', 'ResNetVD', 'ShuntedTransformer', 'VisionTransformer']

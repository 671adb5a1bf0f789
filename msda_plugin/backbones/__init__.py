"""Backbones: images to maps of features."""

from .dat import DAT
from .shunted_transformer import ShuntedTransformer
from .vision_transformer import VisionTransformer

__all__ = ['DAT', 'ShuntedTransformer', 'VisionTransformer']

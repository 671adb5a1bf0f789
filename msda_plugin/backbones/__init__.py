"""Backbones: images to maps of features."""
from .shunted_transformer import ShuntedTransformer

__all__ = ['ShuntedTransformer']

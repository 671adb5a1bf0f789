"""Deformable attention for MMDetection: the operator, the layers, and the detection transformers built on them."""
from msda_plugin.version import __version__

__all__ = ['__version__']

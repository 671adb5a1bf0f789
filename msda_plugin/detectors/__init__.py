"""Detectors."""

from msda_plugin.detectors.deformable_detr import DeformableDETR
from msda_plugin.detectors.detr import DETR

__all__ = ['DETR', 'DeformableDETR']

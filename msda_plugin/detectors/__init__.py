"""Detectors."""

from msda_plugin.detectors.deformable_detr import DeformableDETR
from msda_plugin.detectors.detr import DETR
from msda_plugin.detectors.dfine import DFINE

__all__ = ['DETR', 'DFINE', 'DeformableDETR']

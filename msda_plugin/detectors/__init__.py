"""Detectors."""

from msda_plugin.detectors.deformable_detr import DeformableDETR
from msda_plugin.detectors.detr import DETR
from msda_plugin.detectors.dfine import DFINE
from msda_plugin.detectors.rtdetr import RTDETR

__all__ = ['DETR', 'DFINE', 'DeformableDETR', 'RTDETR']

"""Detectors."""

from msda_plugin.detectors.batch_mixup import BatchMixUp
from msda_plugin.detectors.batch_resize import BatchRandomResize
from msda_plugin.detectors.deformable_detr import DeformableDETR
from msda_plugin.detectors.detr import DETR
from msda_plugin.detectors.dfine import DFINE
from msda_plugin.detectors.rtdetr import RTDETR

__all__ = ['BatchMixUp', 'BatchRandomResize', 'DETR', 'DFINE', 'DeformableDETR', 'RTDETR']

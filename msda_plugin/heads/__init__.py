"""Detection heads."""

from msda_plugin.heads.deformable_detr_head import DeformableDETRHead
from msda_plugin.heads.detr_head import DETRHead

__all__ = ['DETRHead', 'DeformableDETRHead']

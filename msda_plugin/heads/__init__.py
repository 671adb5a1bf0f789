"""Detection heads."""

from msda_plugin.heads.deformable_detr_head import DeformableDETRHead
from msda_plugin.heads.detr_head import DETRHead
from msda_plugin.heads.losses import VarifocalLoss
from msda_plugin.heads.rtdetr_head import RTDETRHead

__all__ = ['DETRHead', 'DeformableDETRHead', 'RTDETRHead', 'VarifocalLoss']

"""Detection heads."""

from msda_plugin.heads.deformable_detr_head import DeformableDETRHead
from msda_plugin.heads.detr_head import DETRHead
from msda_plugin.heads.dfine_head import DFINEHead
from msda_plugin.heads.dfine_losses import DecoupledDistillationFocalLoss, FineGrainedLocalizationLoss
from msda_plugin.heads.losses import MatchabilityAwareLoss, VarifocalLoss
from msda_plugin.heads.rtdetr_head import RTDETRHead

__all__ = [
    'DETRHead',
    'DFINEHead',
    'DecoupledDistillationFocalLoss',
    'DeformableDETRHead',
    'FineGrainedLocalizationLoss',
    'MatchabilityAwareLoss',
    'RTDETRHead',
    'VarifocalLoss',
]

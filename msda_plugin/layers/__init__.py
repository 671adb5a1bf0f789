"""Attention layers."""

from msda_plugin.layers.deformable_attention import DeformableAttention
from msda_plugin.layers.deformable_detr_layers import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerDecoderLayer,
    DeformableDetrTransformerEncoder,
    DeformableDetrTransformerEncoderLayer,
)
from msda_plugin.layers.deformable_multi_head_attention import DeformableMultiHeadAttention
from msda_plugin.layers.detr_layers import (
    DetrTransformerDecoder,
    DetrTransformerDecoderLayer,
    DetrTransformerEncoder,
    DetrTransformerEncoderLayer,
)
from msda_plugin.layers.dfine_layers import DFINETransformerDecoder
from msda_plugin.layers.grounding_dino_layers import GroundingDinoImageEncoder, GroundingDinoImageEncoderLayer
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.layers.points_per_level_attention import PointsPerLevelAttention
from msda_plugin.layers.rtdetr_layers import RTDETRTransformerDecoder
from msda_plugin.layers.shifted_window_attention import ShiftedWindowAttention
from msda_plugin.layers.shunted_self_attention import ShuntedSelfAttention
from msda_plugin.layers.spatial_reduction_attention import SpatialReductionAttention

__all__ = [
    'DFINETransformerDecoder',
    'DeformableAttention',
    'DeformableDetrTransformerDecoder',
    'DeformableDetrTransformerDecoderLayer',
    'DeformableDetrTransformerEncoder',
    'DeformableDetrTransformerEncoderLayer',
    'DeformableMultiHeadAttention',
    'DetrTransformerDecoder',
    'DetrTransformerDecoderLayer',
    'DetrTransformerEncoder',
    'DetrTransformerEncoderLayer',
    'GroundingDinoImageEncoder',
    'GroundingDinoImageEncoderLayer',
    'MultiScaleDeformableAttention',
    'PointsPerLevelAttention',
    'RTDETRTransformerDecoder',
    'ShiftedWindowAttention',
    'ShuntedSelfAttention',
    'SpatialReductionAttention',
]

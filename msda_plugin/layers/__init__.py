"""Attention layers."""

from .deformable_attention import DeformableAttention
from .deformable_detr_layers import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerDecoderLayer,
    DeformableDetrTransformerEncoder,
    DeformableDetrTransformerEncoderLayer,
)
from .deformable_multi_head_attention import DeformableMultiHeadAttention
from .detr_layers import (
    DetrTransformerDecoder,
    DetrTransformerDecoderLayer,
    DetrTransformerEncoder,
    DetrTransformerEncoderLayer,
)
from .grounding_dino_layers import GroundingDinoImageEncoder, GroundingDinoImageEncoderLayer
from .multi_scale_deformable_attention import MultiScaleDeformableAttention
from .shifted_window_attention import ShiftedWindowAttention
from .shunted_self_attention import ShuntedSelfAttention
from .spatial_reduction_attention import SpatialReductionAttention

__all__ = [
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
    'ShiftedWindowAttention',
    'ShuntedSelfAttention',
    'SpatialReductionAttention',
]

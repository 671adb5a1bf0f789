"""Attention layers."""
from .deformable_detr_layers import (
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerDecoderLayer,
    DeformableDetrTransformerEncoder,
    DeformableDetrTransformerEncoderLayer,
)
from .multi_scale_deformable_attention import MultiScaleDeformableAttention
from .shunted_self_attention import ShuntedSelfAttention

__all__ = [
    'DeformableDetrTransformerDecoder',
    'DeformableDetrTransformerDecoderLayer',
    'DeformableDetrTransformerEncoder',
    'DeformableDetrTransformerEncoderLayer',
    'MultiScaleDeformableAttention',
    'ShuntedSelfAttention',
]

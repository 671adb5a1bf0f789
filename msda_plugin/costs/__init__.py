"""The cost of attention: formulas, and a counter for models."""

from msda_plugin.costs.formulas import (
    Cost,
    convolution,
    cross_attention,
    deformable_attention,
    detr_decoder_layer,
    detr_encoder_layer,
    linear_spatial_reduction_attention,
    self_attention,
    shunted_attention,
    spatial_reduction_attention,
    vit_attention,
    window_attention,
)

__all__ = [
    'Cost',
    'convolution',
    'cross_attention',
    'deformable_attention',
    'detr_decoder_layer',
    'detr_encoder_layer',
    'linear_spatial_reduction_attention',
    'self_attention',
    'shunted_attention',
    'spatial_reduction_attention',
    'vit_attention',
    'window_attention',
]

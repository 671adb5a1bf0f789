"""Encoder and decoder of Deformable DETR, with attention layers that the config chooses.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159. Modules and state-dict keys are MMDetection's.
The layer stack is the one of :mod:`msda_plugin.layers.detr_layers`. No forward synchronizes with the device.
"""

from collections.abc import Sequence

import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.layers.transformer import deformable_detr_layers as mmdet_layers
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.detr_layers import (
    DetrTransformerDecoder,
    DetrTransformerDecoderLayer,
    DetrTransformerEncoder,
    DetrTransformerEncoderLayer,
)
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.layers.reference_points import Shapes, as_shape_tensor, pixel_centers
from msda_plugin.layers.transformer_parts import run_layer
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DeformableDetrTransformerEncoderLayer(
    DetrTransformerEncoderLayer, mmdet_layers.DeformableDetrTransformerEncoderLayer
):
    """DETR's encoder layer with :class:`MultiScaleDeformableAttention`."""

    self_attn_class = MultiScaleDeformableAttention


@MODELS.register_module()
class DeformableDetrTransformerDecoderLayer(
    DetrTransformerDecoderLayer, mmdet_layers.DeformableDetrTransformerDecoderLayer
):
    """DETR's decoder layer with :class:`MultiScaleDeformableAttention` to the memory."""

    cross_attn_class = MultiScaleDeformableAttention


@MODELS.register_module()
class DeformableDetrTransformerEncoder(DetrTransformerEncoder, mmdet_layers.DeformableDetrTransformerEncoder):
    """The encoder of Deformable DETR. Arguments are those of :class:`DetrTransformerEncoder`."""

    layer_class = DeformableDetrTransformerEncoderLayer

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Shapes,
        level_start_index: Tensor | None,
        valid_ratios: Tensor,
    ) -> Tensor:
        """Encode the pixels of all levels.

        Args:
            query: (bs, num_keys, embed_dims), the pixels of all levels, row by row.
            query_pos: sum of position and level embedding, with the query's shape.
            key_padding_mask: (bs, num_keys), True on padding; None: no padding.
            spatial_shapes: (h, w) of each level, as pairs of integers or (num_levels, 2) int64.
            level_start_index: (num_levels,) int64, the first key of each level.
            valid_ratios: (bs, num_levels, 2), the unpadded share of each level's width and height, 0-1.

        Returns:
            The memory, (bs, num_keys, embed_dims).
        """
        return super().forward(
            query,
            query_pos,
            key_padding_mask,
            spatial_shapes=as_shape_tensor(spatial_shapes, query.device),
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
            reference_points=self.get_encoder_reference_points(spatial_shapes, valid_ratios, query.device),
        )

    @staticmethod
    def get_encoder_reference_points(
        spatial_shapes: Shapes, valid_ratios: Tensor, device: torch.device | str
    ) -> Tensor:
        """The center of each pixel on every level: (bs, num_keys, num_levels, 2), 0-1 over the padded level."""
        valid_ratios = valid_ratios.to(device)
        return pixel_centers(spatial_shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]


@MODELS.register_module()
class DeformableDetrTransformerDecoder(DetrTransformerDecoder, mmdet_layers.DeformableDetrTransformerDecoder):
    """The decoder of Deformable DETR, with box refinement if it gets the regression branches.

    Arguments are those of :class:`DetrTransformerDecoder`, except for ``post_norm_cfg``, which must be None: there is
    no norm after the last layer.
    """

    layer_class = DeformableDetrTransformerDecoderLayer

    def _init_post_norm(self) -> None:
        if self.post_norm_cfg is not None:
            raise ValueError(
                f'post_norm_cfg is {self.post_norm_cfg}, but the decoder of Deformable DETR has no norm after '
                'the last layer: set it to None'
            )

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Shapes,
        level_start_index: Tensor | None,
        valid_ratios: Tensor,
        reg_branches: Sequence[nn.Module] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode the queries.

        Args:
            query, query_pos: (bs, num_queries, embed_dims).
            value: the memory, (bs, num_keys, embed_dims).
            key_padding_mask: (bs, num_keys), True on padding; None: no padding.
            reference_points: (bs, num_queries, 2) points or (..., 4) boxes (cx, cy, w, h), 0-1 over the unpadded image.
            spatial_shapes, level_start_index, valid_ratios: as for the encoder.
            reg_branches: one per layer; each layer then refines the reference boxes of the next one.

        Returns:
            Outputs (num_layers, bs, num_queries, embed_dims), and the references after each layer (num_layers, bs,
            num_queries, 2 or 4), detached if refined. Without ``return_intermediate`` both are of the last layer, and
            have no first dimension.
        """
        spatial_shapes = as_shape_tensor(spatial_shapes, query.device)
        outputs, references = [], []
        for i, layer in enumerate(self.layers):
            # (bs, num_queries, num_levels, 2 or 4), relative to the padded levels
            scale = valid_ratios.repeat(1, 1, reference_points.shape[-1] // 2)
            query = run_layer(
                layer,
                self.training and i < self.num_cp,
                query=query,
                query_pos=query_pos,
                value=value,
                key_padding_mask=key_padding_mask,
                spatial_shapes=spatial_shapes,
                level_start_index=level_start_index,
                valid_ratios=valid_ratios,
                reference_points=reference_points[:, :, None] * scale[:, None],
            )
            if reg_branches is not None:
                reference_points = refine(reg_branches[i](query), reference_points).detach()
            outputs.append(query)
            references.append(reference_points)
        if self.return_intermediate:
            return torch.stack(outputs), torch.stack(references)
        return query, reference_points


def refine(deltas: Tensor, reference: Tensor) -> Tensor:
    """Refine reference boxes in logit space.

    Args:
        deltas: (..., 4), added to the logits of the reference.
        reference: (..., 4) boxes (cx, cy, w, h), or (..., 2) centers, whose width and height come from ``deltas`` only;
            0-1.

    Returns:
        Boxes (..., 4), (cx, cy, w, h), 0-1.
    """
    return (deltas + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))).sigmoid()

"""The decoder of RT-DETR.

Source: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", https://arxiv.org/abs/2304.08069.
"""

from collections.abc import Sequence

import torch
from mmdet.models.layers import MLP
from torch import Tensor, nn

from msda_plugin.layers.deformable_detr_layers import DeformableDetrTransformerDecoder, refine
from msda_plugin.layers.reference_points import Shapes, as_shape_tensor
from msda_plugin.layers.transformer_parts import run_layer
from msda_plugin.registry import MODELS


@MODELS.register_module()
class RTDETRTransformerDecoder(DeformableDetrTransformerDecoder):
    """Deformable DETR's decoder whose query positions are computed from the reference boxes before every layer.

    Args:
        num_eval_layers: number of layers that run in evaluation; None: all. (RT-DETRv2-M is trained with six layers and
            evaluated with three.)
        **kwargs: as for :class:`DeformableDetrTransformerDecoder`.

    Raises:
        ValueError: If ``num_eval_layers`` is not 1 to ``num_layers``.
    """

    def __init__(self, *args, num_eval_layers: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if num_eval_layers is not None and not 1 <= num_eval_layers <= self.num_layers:
            raise ValueError(
                f'num_eval_layers={num_eval_layers}; expected 1 to num_layers={self.num_layers}, or None for all layers'
            )
        self.num_eval_layers = num_eval_layers

    def _init_layers(self) -> None:
        super()._init_layers()
        self.ref_point_head = MLP(4, 2 * self.embed_dims, self.embed_dims, 2)

    def init_weights(self) -> None:
        """Initialize as the authors: Xavier for the feed-forward networks and the position network."""
        super().init_weights()
        for module in (self.ref_point_head, *(layer.ffn for layer in self.layers)):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Shapes,
        level_start_index: Tensor | None,
        valid_ratios: Tensor,
        reg_branches: Sequence[nn.Module],
        self_attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode the queries.

        Args:
            query: (bs, num_queries, embed_dims).
            value: the memory, (bs, num_keys, embed_dims).
            key_padding_mask: (bs, num_keys), True on padding; None: no padding.
            reference_points: (bs, num_queries, 4) boxes (cx, cy, w, h), 0-1 over the unpadded image.
            spatial_shapes, level_start_index, valid_ratios: as for the encoder of Deformable DETR.
            reg_branches: at least one per layer, except for the last.
            self_attn_mask: (num_queries, num_queries) bool, True where a query must not attend to another one.

        Returns:
            Outputs (num_layers, bs, num_queries, embed_dims), and the reference boxes (bs, num_queries, 4) before each
            layer. The next layer gets them detached, the head with the gradient of the layer before it.
        """
        layers = self.layers if self.training else self.layers[: self.num_eval_layers]
        shapes = as_shape_tensor(spatial_shapes, query.device)
        scale = valid_ratios.repeat(1, 1, 2)[:, None]  # (bs, 1, num_levels, 4)
        outputs, references = [], [reference_points]
        for i, layer in enumerate(layers):
            reference = references[-1].detach()
            query = run_layer(
                layer,
                self.training and i < self.num_cp,
                query=query,
                query_pos=self.ref_point_head(reference),
                value=value,
                key_padding_mask=key_padding_mask,
                self_attn_mask=self_attn_mask,
                spatial_shapes=shapes,
                level_start_index=level_start_index,
                valid_ratios=valid_ratios,
                reference_points=reference[:, :, None] * scale,
            )
            outputs.append(query)
            if i + 1 < len(layers):
                references.append(refine(reg_branches[i](query), reference))
        return torch.stack(outputs), references

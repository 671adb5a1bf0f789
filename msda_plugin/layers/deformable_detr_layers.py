"""Encoder and decoder of Deformable DETR, with every attention built from its config.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159. Modules and state-dict keys are MMDetection's;
here the attention comes from the registry, checkpointing is plain torch, and no forward waits for the device.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.layers.transformer import deformable_detr_layers as mmdet_layers
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.layers.transformer_parts import build_attention, build_ffn, build_or_default, check_num_cp, run_layer
from msda_plugin.registry import MODELS

Shapes = Tensor | Sequence[tuple[int, int]]


def pixel_centers(spatial_shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Centres of all pixels, 0 to 1 over the part of their level that is not padding.

    Args:
        spatial_shapes: (h, w) of each level. Python pairs cost nothing; a device tensor is waited for.
        valid_ratios: (bs, num_levels, 2), the valid share of each level's width and height.

    Returns:
        (bs, num_keys, 2), (x, y), float32; beyond 1 in the padding.
    """
    device = valid_ratios.device
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    centers = []
    for (height, width), ratio in zip(shapes, valid_ratios.float().unbind(1), strict=True):
        # (bs, w) and (bs, h) -> (bs, h, w, 2)
        x = torch.arange(0.5, width, device=device) / (ratio[:, :1] * width)
        y = torch.arange(0.5, height, device=device) / (ratio[:, 1:] * height)
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        centers.append(grid.flatten(1, 2))
    return torch.cat(centers, 1)


def as_shape_tensor(spatial_shapes: Shapes, device: torch.device) -> Tensor:
    """(num_levels, 2) int64 on the device, without waiting for it; tensors pass through."""
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes
    return torch.tensor(spatial_shapes, dtype=torch.int64).to(device, non_blocking=True)


@MODELS.register_module()
class DeformableDetrTransformerEncoderLayer(mmdet_layers.DeformableDetrTransformerEncoderLayer):
    """x = norm(x + attention(x)), x = norm(x + ffn(x)).

    Fields are MMDetection's: ``self_attn_cfg`` (its ``type`` is optional and defaults to ours), ``ffn_cfg`` and
    ``norm_cfg``.
    """

    def _init_layers(self) -> None:
        self.self_attn = build_or_default(self.self_attn_cfg, MultiScaleDeformableAttention)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = build_ffn(self.ffn_cfg)
        self.norms = ModuleList([build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(2)])


@MODELS.register_module()
class DeformableDetrTransformerDecoderLayer(mmdet_layers.DeformableDetrTransformerDecoderLayer):
    """Self-attention among the queries, deformable attention to the memory, FFN, each followed by a norm.

    Fields are MMDetection's: ``self_attn_cfg`` (``type`` defaults to mmcv's multi-head attention), ``cross_attn_cfg``
    (``type`` defaults to our deformable attention), ``ffn_cfg``, ``norm_cfg``.
    """

    def _init_layers(self) -> None:
        self.self_attn = build_attention(self.self_attn_cfg)
        self.cross_attn = build_or_default(self.cross_attn_cfg, MultiScaleDeformableAttention)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = build_ffn(self.ffn_cfg)
        self.norms = ModuleList([build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(3)])


@MODELS.register_module()
class DeformableDetrTransformerEncoder(mmdet_layers.DeformableDetrTransformerEncoder):
    """The encoder of Deformable DETR.

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; its ``type`` is optional.
        num_cp: the first ``num_cp`` layers recompute their activations in the backward pass.
    """

    def __init__(self, num_layers: int, layer_cfg: dict, num_cp: int = -1, init_cfg: dict | None = None) -> None:
        check_num_cp(num_cp, num_layers)
        super().__init__(num_layers=num_layers, layer_cfg=layer_cfg, num_cp=num_cp, init_cfg=init_cfg)

    def _init_layers(self) -> None:
        self.layers = ModuleList(
            [build_or_default(self.layer_cfg, DeformableDetrTransformerEncoderLayer) for _ in range(self.num_layers)]
        )
        self.embed_dims = self.layers[0].embed_dims

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
            query_pos: position and level embedding, with the query's shape.
            key_padding_mask: (bs, num_keys), True on padding; None: there is none.
            spatial_shapes: (h, w) of each level, as Python pairs or (num_levels, 2) int64.
            level_start_index: (num_levels,) int64, the first key of each level.
            valid_ratios: (bs, num_levels, 2), the share of each level's width and height that is not padding.

        Returns:
            The memory, (bs, num_keys, embed_dims).
        """
        reference_points = self.get_encoder_reference_points(spatial_shapes, valid_ratios, query.device)
        spatial_shapes = as_shape_tensor(spatial_shapes, query.device)
        for i, layer in enumerate(self.layers):
            query = run_layer(
                layer,
                self.training and i < self.num_cp,
                query=query,
                query_pos=query_pos,
                key_padding_mask=key_padding_mask,
                spatial_shapes=spatial_shapes,
                level_start_index=level_start_index,
                valid_ratios=valid_ratios,
                reference_points=reference_points,
            )
        return query

    @staticmethod
    def get_encoder_reference_points(
        spatial_shapes: Shapes, valid_ratios: Tensor, device: torch.device | str
    ) -> Tensor:
        """Every pixel's own centre, on every level: (bs, num_keys, num_levels, 2), 0 to 1 over the padded level."""
        valid_ratios = valid_ratios.to(device)
        return pixel_centers(spatial_shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]


@MODELS.register_module()
class DeformableDetrTransformerDecoder(mmdet_layers.DeformableDetrTransformerDecoder):
    """The decoder of Deformable DETR, with box refinement when it is given the regression branches.

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; its ``type`` is optional.
        post_norm_cfg: None; there is no norm after the last layer.
        return_intermediate: return the outputs of all layers, not of the last one alone.
        num_cp: the first ``num_cp`` layers recompute their activations in the backward pass.
    """

    def __init__(
        self,
        num_layers: int,
        layer_cfg: dict,
        post_norm_cfg: dict | None = None,
        return_intermediate: bool = True,
        num_cp: int = -1,
        init_cfg: dict | None = None,
    ) -> None:
        check_num_cp(num_cp, num_layers)
        if post_norm_cfg is not None:
            raise ValueError(
                f'post_norm_cfg is {post_norm_cfg}, but the decoder of Deformable DETR has no norm after '
                'the last layer: set it to None'
            )
        # BaseModule's, past MMDetection's: theirs requires a post_norm_cfg by default.
        BaseModule.__init__(self, init_cfg=init_cfg)
        self.num_layers = num_layers
        self.layer_cfg = layer_cfg
        self.post_norm_cfg = post_norm_cfg
        self.return_intermediate = return_intermediate
        self.num_cp = num_cp
        self._init_layers()

    def _init_layers(self) -> None:
        self.layers = ModuleList(
            [build_or_default(self.layer_cfg, DeformableDetrTransformerDecoderLayer) for _ in range(self.num_layers)]
        )
        self.embed_dims = self.layers[0].embed_dims

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
            key_padding_mask: (bs, num_keys), True on padding; None: there is none.
            reference_points: (bs, num_queries, 2) points or (..., 4) boxes (cx, cy, w, h), 0 to 1 over the valid image.
            spatial_shapes, level_start_index, valid_ratios: as for the encoder.
            reg_branches: one per layer; with them each layer refines the reference of the next one.

        Returns:
            Outputs (num_layers, bs, num_queries, embed_dims) and the reference after each layer (num_layers, bs,
            num_queries, 2 or 4), detached where refined; of the last layer alone, without the first dimension, unless
            ``return_intermediate``.
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
    """Boxes (..., 4) as (cx, cy, w, h), 0 to 1: the reference, moved by ``deltas`` (..., 4) in logit space.

    A reference of two coordinates gives the centre alone; its width and height are the deltas' own.
    """
    return (deltas + F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))).sigmoid()

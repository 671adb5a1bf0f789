"""Multi-scale deformable attention as a layer.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1 and equation 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVMultiScaleDeformableAttention
from torch import Tensor

from msda_plugin.layers.reference_points import Shapes, sampling_locations
from msda_plugin.ops import ms_deform_attn_fused
from msda_plugin.registry import MODELS


class Sampling(NamedTuple):
    """The points that deformable attention samples, and their weights.

    ``msda_plugin.ops.ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)``, with the projected
    value, is the layer's attention before the output projection.

    Attributes:
        locations: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y), 0-1 over the level, padding
            included; outside 0-1 beyond the level. At least float32.
        weights: (bs, num_queries, num_heads, num_levels, num_points), summing to 1 over levels and points together. At
            least float32.
        reference_points: (bs, num_queries, num_levels, 2) points (x, y) or (..., 4) boxes (cx, cy, w, h), 0-1 over the
            level, padding included.
        spatial_shapes: (h, w) of each level, as pairs or as a tensor (num_levels, 2).
    """

    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    spatial_shapes: Shapes


@MODELS.register_module()
class MultiScaleDeformableAttention(MMCVMultiScaleDeformableAttention):
    """mmcv's layer on msda_plugin's operator: same fields, same parameters, same results.

    It is a subclass because detectors find the layer by ``isinstance`` when they initialize weights. ``im2col_step`` is
    accepted for compatibility and has no effect: the operator takes any batch size.

    Example:
        >>> layer = MultiScaleDeformableAttention(embed_dims=32, num_heads=4, num_levels=2, batch_first=True)
        >>> tokens, shapes = torch.rand(1, 6 * 8 + 3 * 4, 32), [(6, 8), (3, 4)]
        >>> layer(tokens, reference_points=torch.rand(1, 60, 2, 2), spatial_shapes=shapes).shape
        torch.Size([1, 60, 32])
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
        value_proj_ratio: float = 1.0,
    ):
        sizes = dict(embed_dims=embed_dims, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        if min(sizes.values()) < 1:
            raise ValueError(
                f'{", ".join(f"{name}={size}" for name, size in sizes.items())}; expected at least 1 for each of them'
            )
        super().__init__(
            embed_dims,
            num_heads,
            num_levels,
            num_points,
            im2col_step,
            dropout,
            batch_first,
            norm_cfg,
            init_cfg,
            value_proj_ratio,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend from each query to a few points around its reference, on every level.

        Args:
            query: (bs, num_queries, embed_dims), or (num_queries, bs, embed_dims) unless ``batch_first``.
            key: unused; deformable attention has no keys.
            value: (bs, num_keys, embed_dims), the pixels of all levels row by row; batch second unless ``batch_first``.
                None: the query.
            identity: added to the result, with the query's shape. None: the query, without ``query_pos``.
            query_pos: added to the query before its projections, with its shape.
            key_padding_mask: (bs, num_keys), True where the value is padding.
            reference_points: (bs, num_queries, num_levels, 2) points (x, y), or (..., 4) boxes (cx, cy, w, h), 0-1 over
                the level, padding included.
            spatial_shapes: (num_levels, 2) int64, (h, w) of each level; or a sequence of pairs (h, w), whose values
                are checked on every device.
            level_start_index: (num_levels,) int64, the first key of each level. None: the levels follow one another.
            **kwargs: ignored, except for ``residual``, the old name of ``identity``. Transformer layers pass the same
                keywords (``key_pos``, ``attn_mask``, ``valid_ratios``) to all their attention layers.

        Returns:
            ``dropout(attention) + identity``, with the query's shape. Under autocast the attention runs in low
            precision, the sampling locations and the sums in float32.

        Raises:
            ValueError: If an argument is missing or has the wrong shape.
            TypeError: If an argument has the wrong dtype.
        """
        identity = kwargs.get('residual') if identity is None else identity
        given = (query, value, identity, query_pos, key_padding_mask, reference_points, spatial_shapes)
        return _forward(self, _attend, *given, level_start_index)

    def sampling(
        self,
        query: Tensor,
        *,
        query_pos: Tensor | None = None,
        reference_points: Tensor,
        spatial_shapes: Shapes,
        **kwargs,
    ) -> Sampling:
        """The sampling points and weights of a :meth:`forward` with the same arguments.

        mmcv's layer has them too: ``MultiScaleDeformableAttention.sampling(mmcv_layer, ...)``.

        Args:
            query, query_pos, reference_points, spatial_shapes: as for :meth:`forward`.
            **kwargs: the other arguments of :meth:`forward`, ignored.
        """
        offsets, logits = _project_queries(self, _batch_first_queries(self, query, query_pos))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Sampling(
            locations=sampling_locations(reference_points, offsets, spatial_shapes),
            weights=logits.flatten(3).softmax(-1).view(logits.shape),
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
        )


# Functions instead of methods: `msda_plugin.auto` and `sampling` use them on mmcv's own layers.
def _forward(
    layer: MMCVMultiScaleDeformableAttention,
    attend: Callable[..., Tensor],
    query: Tensor,
    value: Tensor | None,
    identity: Tensor | None,
    query_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: Shapes | None,
    level_start_index: Tensor | None,
) -> Tensor:
    """The forward pass around ``attend``, which takes what :func:`_attend` takes."""
    value = query if value is None else value
    identity = query if identity is None else identity
    if not layer.batch_first:
        value = value.transpose(0, 1)
    query = _batch_first_queries(layer, query, query_pos)
    _check(layer, query, value, key_padding_mask, reference_points, spatial_shapes)

    projected = layer.value_proj(value)
    if key_padding_mask is not None:
        # In place only without gradients: a projection's output is a view, and autograd would copy it.
        in_place = not projected.requires_grad and projected is not value
        fill = projected.masked_fill_ if in_place else projected.masked_fill
        projected = fill(key_padding_mask.bool()[..., None], 0)
    projected = projected.unflatten(-1, (layer.num_heads, -1))
    output = layer.output_proj(attend(layer, query, projected, reference_points, spatial_shapes, level_start_index))
    if not layer.batch_first:
        output = output.transpose(0, 1)
    return layer.dropout(output) + identity


def _attend(
    layer: MMCVMultiScaleDeformableAttention,
    query: Tensor,
    value: Tensor,
    reference_points: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
) -> Tensor:
    """Queries (bs, num_queries, embed_dims), values (bs, num_keys, num_heads, head_dim) -> as the queries."""
    offsets, logits = _project_queries(layer, query)
    return ms_deform_attn_fused(value, spatial_shapes, level_start_index, reference_points, offsets, logits)


def _batch_first_queries(layer: MMCVMultiScaleDeformableAttention, query: Tensor, query_pos: Tensor | None) -> Tensor:
    """``query + query_pos``, (bs, num_queries, embed_dims)."""
    if query_pos is not None:
        query = query + query_pos
    return query if layer.batch_first else query.transpose(0, 1)


def _project_queries(layer: MMCVMultiScaleDeformableAttention, query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (bs, num_queries, embed_dims) -> sampling offsets and attention logits.

    Both are (bs, num_queries, num_heads, num_levels, num_points), the offsets with a last dimension of 2, (x, y).
    """
    points = (*query.shape[:2], layer.num_heads, layer.num_levels, layer.num_points)
    return layer.sampling_offsets(query).view(*points, 2), layer.attention_weights(query).view(points)


def _check(
    layer: MMCVMultiScaleDeformableAttention,
    query: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: Shapes | None,
) -> None:
    """Check what the operator does not know: missing arguments and the layer's own sizes."""
    for name, argument in (('reference_points', reference_points), ('spatial_shapes', spatial_shapes)):
        if argument is None:
            raise ValueError(f'{name} is None, but deformable attention needs it in every call')
    layout = f'batch_first={layer.batch_first}'
    if (
        query.dim() != 3
        or value.dim() != 3
        or query.shape[-1] != layer.embed_dims
        or value.shape[-1] != layer.embed_dims
    ):
        raise ValueError(
            f'query has shape {tuple(query.shape)} and value {tuple(value.shape)} (batch first); expected '
            f'(bs, num_queries, {layer.embed_dims}) and (bs, num_keys, {layer.embed_dims})'
        )
    if query.shape[0] != value.shape[0]:
        raise ValueError(
            f'query has batch size {query.shape[0]} and value {value.shape[0]} with {layout}: make them '
            'equal, or set batch_first to the layout of your tensors'
        )
    if reference_points.dim() != 4 or reference_points.shape[:2] != query.shape[:2]:
        raise ValueError(
            f'reference_points has shape {tuple(reference_points.shape)}; expected (bs, num_queries, num_levels, '
            f'2 or 4) with bs, num_queries = {tuple(query.shape[:2])}. The layer has {layout}'
        )
    if len(spatial_shapes) != layer.num_levels:
        raise ValueError(
            f'spatial_shapes has {len(spatial_shapes)} levels, but the layer was built with '
            f'num_levels={layer.num_levels}: set num_levels={len(spatial_shapes)}'
        )
    if key_padding_mask is not None and key_padding_mask.shape != value.shape[:2]:
        raise ValueError(
            f'key_padding_mask has shape {tuple(key_padding_mask.shape)}; expected (bs, num_keys) = '
            f'{tuple(value.shape[:2])}, True where the value is padding'
        )

"""Multi-scale deformable attention as a layer.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1 and equation 3.
"""

from collections.abc import Sequence

from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVMultiScaleDeformableAttention
from torch import Tensor

from msda_plugin.ops import ms_deform_attn_fused
from msda_plugin.registry import MODELS


@MODELS.register_module()
class MultiScaleDeformableAttention(MMCVMultiScaleDeformableAttention):
    """mmcv's layer on our operator: same fields, same parameters, same numbers.

    It stays a subclass because detectors recognise the layer by ``isinstance`` when they initialise weights.
    ``im2col_step`` is accepted and has no effect: the operator takes any batch size.

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
                f'{", ".join(f"{name}={size}" for name, size in sizes.items())} do not fit; expected 1 or more of each'
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
        spatial_shapes: Tensor | Sequence[tuple[int, int]] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend from each query to a few points around its reference, on every level.

        Args:
            query: (bs, num_queries, embed_dims), or (num_queries, bs, embed_dims) unless ``batch_first``.
            key: unused; deformable attention has no keys.
            value: (bs, num_keys, embed_dims), the pixels of all levels row by row; batch second unless ``batch_first``.
                None: the query.
            identity: what is added to the result, with the query's shape. None: the query, without ``query_pos``.
            query_pos: added to the query first, with its shape.
            key_padding_mask: (bs, num_keys), True where the value is padding.
            reference_points: (bs, num_queries, num_levels, 2) points (x, y), or (..., 4) boxes (cx, cy, w, h), 0 to 1
                over the level, padding included.
            spatial_shapes: (num_levels, 2) int64, (h, w) of each level; or a sequence of pairs (h, w), whose values
                can be checked on every device.
            level_start_index: (num_levels,) int64, the first key of each level. None: levels one after the other.
            **kwargs: ignored, but for ``residual``, the old name of ``identity``. Transformer layers hand all their
                attentions the same keywords (``key_pos``, ``attn_mask``, ``valid_ratios``).

        Returns:
            ``dropout(attention) + identity``, with the query's shape. Under autocast the attention runs in the low
            precision, the sampling locations and the sums in float32.

        Raises:
            ValueError, TypeError: An argument is missing or does not fit.
        """
        value = query if value is None else value
        identity = kwargs.get('residual', query) if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        _check(self, query, value, key_padding_mask, reference_points, spatial_shapes)
        batch, num_queries, _ = query.shape

        value = self.value_proj(value)
        if key_padding_mask is not None:
            # In place only without gradients: of a view, which a projection's output is, autograd would copy it.
            fill = value.masked_fill if value.requires_grad else value.masked_fill_
            value = fill(key_padding_mask.bool()[..., None], 0)
        value = value.view(batch, value.shape[1], self.num_heads, value.shape[-1] // self.num_heads)
        # (bs, num_queries, num_heads, num_levels, num_points[, 2])
        points = (batch, num_queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*points, 2)
        logits = self.attention_weights(query).view(points)
        output = ms_deform_attn_fused(value, spatial_shapes, level_start_index, reference_points, offsets, logits)

        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity


def _check(
    layer: MMCVMultiScaleDeformableAttention,
    query: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    reference_points: Tensor | None,
    spatial_shapes: Tensor | Sequence[tuple[int, int]] | None,
) -> None:
    """What the operator cannot know: the layer's own sizes, and which of its arguments are missing."""
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
            f'query is {tuple(query.shape)} and value {tuple(value.shape)} (batch first), but '
            f'(bs, num_queries, {layer.embed_dims}) and (bs, num_keys, {layer.embed_dims}) are needed'
        )
    if query.shape[0] != value.shape[0]:
        raise ValueError(
            f'query has batch {query.shape[0]} and value {value.shape[0]} with {layout}: make them '
            'equal, or set batch_first to the layout of your tensors'
        )
    if reference_points.dim() != 4 or reference_points.shape[:2] != query.shape[:2]:
        raise ValueError(
            f'reference_points is {tuple(reference_points.shape)}, but (bs, num_queries, num_levels, '
            f'2 or 4) with bs, num_queries = {tuple(query.shape[:2])} is needed; the query was read '
            f'with {layout}'
        )
    if len(spatial_shapes) != layer.num_levels:
        raise ValueError(
            f'spatial_shapes has {len(spatial_shapes)} levels, but the layer was built with '
            f'num_levels={layer.num_levels}: give the layer num_levels={len(spatial_shapes)}'
        )
    if key_padding_mask is not None and key_padding_mask.shape != value.shape[:2]:
        raise ValueError(
            f'key_padding_mask is {tuple(key_padding_mask.shape)}, but (bs, num_keys) = '
            f'{tuple(value.shape[:2])} is needed, True where the value is padding'
        )

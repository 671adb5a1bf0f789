"""Deformable attention on one scale.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1 and equation 2.
"""

from torch import Tensor

from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention, Sampling
from msda_plugin.layers.reference_points import Shapes, pixel_centers
from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DeformableAttention(MultiScaleDeformableAttention):
    """Multi-scale deformable attention with one level, on tokens or on feature maps: same parameters, same results.

    It is a subclass because detectors find the layer by ``isinstance`` when they initialize weights. It takes the same
    keywords, so an encoder with one level can use it.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: number of heads.
        num_points: sampling points per query and head.
        dropout: dropout of the output before the identity is added, 0-1.
        batch_first: must be True; tokens are (bs, num_tokens, C).
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, or ``batch_first`` is False.

    Example:
        >>> layer = DeformableAttention(embed_dims=32, num_heads=4)
        >>> layer(torch.rand(1, 32, 6, 8)).shape
        torch.Size([1, 32, 6, 8])
        >>> layer(torch.rand(1, 5, 32), value=torch.rand(1, 32, 6, 8), reference_points=torch.rand(1, 5, 2)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.1,
        batch_first: bool = True,
        init_cfg: dict | list | None = None,
    ):
        if not batch_first:
            raise ValueError(
                'batch_first=False, but DeformableAttention takes tokens (bs, num_tokens, embed_dims): '
                'set batch_first=True, and transpose tokens of shape (num_tokens, bs, embed_dims)'
            )
        super().__init__(
            embed_dims,
            num_heads,
            num_levels=1,
            num_points=num_points,
            dropout=dropout,
            batch_first=True,
            init_cfg=init_cfg,
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
        spatial_shapes: Shapes | tuple[int, int] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend from each query to a few points around its reference.

        Args:
            query: tokens (bs, num_queries, C), or a map (bs, C, h, w), whose pixels are the queries.
            key: unused; deformable attention has no keys.
            value: tokens (bs, h * w, C), row by row, or a map (bs, C, h, w). None: the query.
            identity: added to the result, with the query's shape. None: the query, without ``query_pos``.
            query_pos: added to the query before its projections, with its shape.
            key_padding_mask: (bs, h * w) or (bs, h, w), True where the value is padding.
            reference_points: (bs, num_queries, 2) points (x, y), or (..., 4) boxes (cx, cy, w, h), 0-1 over the
                value's map, padding included; optionally with a level dimension, (bs, num_queries, 1, 2 or 4). None:
                the queries are the pixels of the value's map, and each refers to its center.
            spatial_shapes: (h, w) of the value's map, [(h, w)], or a tensor (1, 2); required unless the value is a map.
                A device tensor causes a device synchronization if ``reference_points`` is None.
            level_start_index, **kwargs: ignored; keywords of multi-scale attention.

        Returns:
            With the query's shape: tokens or a map.

        Raises:
            ValueError: If an argument is missing or has the wrong shape.
            TypeError: If an argument has the wrong dtype.
        """
        map_shape = query.shape[2:] if query.dim() == 4 else None
        query, value, reference_points, spatial_shapes = self._as_tokens(query, value, reference_points, spatial_shapes)
        out = super().forward(
            query,
            value=value,
            identity=_tokens(identity),
            query_pos=_tokens(query_pos),
            key_padding_mask=None if key_padding_mask is None else key_padding_mask.flatten(1),
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
        )
        return out if map_shape is None else tokens_to_map(out, map_shape)

    def sampling(
        self,
        query: Tensor,
        *,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Shapes | tuple[int, int] | None = None,
        **kwargs,
    ) -> Sampling:
        """The sampling points and weights of a :meth:`forward` with the same arguments, with ``num_levels`` = 1.

        Args:
            query, value, query_pos, reference_points, spatial_shapes: as for :meth:`forward`.
            **kwargs: the other arguments of :meth:`forward`, ignored.
        """
        query, _, reference_points, spatial_shapes = self._as_tokens(query, value, reference_points, spatial_shapes)
        return super().sampling(
            query, query_pos=_tokens(query_pos), reference_points=reference_points, spatial_shapes=spatial_shapes
        )

    def _as_tokens(
        self,
        query: Tensor,
        value: Tensor | None,
        reference_points: Tensor | None,
        spatial_shapes: Shapes | tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Shapes]:
        """Bring the arguments of :meth:`forward` to the form that multi-scale attention takes."""
        value = query if value is None else value
        if value.dim() == 4:
            spatial_shapes = [tuple(value.shape[2:])]
        elif spatial_shapes is None:
            raise ValueError(
                f'value has shape {tuple(value.shape)} and spatial_shapes is None; expected a map (bs, '
                f'{self.embed_dims}, h, w), or tokens with spatial_shapes=(h, w)'
            )
        elif not isinstance(spatial_shapes, Tensor) and len(spatial_shapes) == 2 and isinstance(spatial_shapes[0], int):
            spatial_shapes = [spatial_shapes]
        query, value = _tokens(query), _tokens(value)
        if reference_points is None:
            if query.shape[1] != value.shape[1]:
                raise ValueError(
                    f'reference_points is None, but there are {query.shape[1]} queries for the '
                    f'{value.shape[1]} pixels of the value: give reference_points (bs, num_queries, 2 or 4), '
                    'or one query per pixel'
                )
            reference_points = pixel_centers(spatial_shapes, value.new_ones(len(value), 1, 2))[:, :, None]
        elif reference_points.dim() == 3:
            reference_points = reference_points[:, :, None]
        return query, value, reference_points, spatial_shapes


def _tokens(x: Tensor | None) -> Tensor | None:
    """Maps (bs, C, h, w) as tokens (bs, h * w, C); everything else unchanged."""
    return map_to_tokens(x) if x is not None and x.dim() == 4 else x

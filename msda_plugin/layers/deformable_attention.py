"""Deformable attention on one scale.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1 and equation 2.
"""

from collections.abc import Sequence

from torch import Tensor

from msda_plugin.registry import MODELS

from .deformable_detr_layers import pixel_centers
from .multi_scale_deformable_attention import MultiScaleDeformableAttention
from .token_layout import map_to_tokens, tokens_to_map


@MODELS.register_module()
class DeformableAttention(MultiScaleDeformableAttention):
    """Multi-scale deformable attention with one level, on tokens or on maps: same parameters, same numbers.

    It stays a subclass because detectors recognise the layer by ``isinstance`` when they initialise weights, and takes
    the same keywords, so that an encoder of one level can be given it as its attention.

    Args:
        embed_dims: channels C; a multiple of ``num_heads``.
        num_heads: heads.
        num_points: sampling points of each query in each head.
        dropout: dropout of the output before the identity is added, 0-1.
        batch_first: True; tokens are (bs, num_tokens, C).
        init_cfg: MMEngine's initialisation config.

    Raises:
        ValueError: ``embed_dims`` is not a multiple of ``num_heads``, or ``batch_first`` is False.

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
                'set it to True, and transpose tokens whose batch is second'
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
        spatial_shapes: Tensor | Sequence[tuple[int, int]] | tuple[int, int] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend from each query to a few points around its reference.

        Args:
            query: tokens (bs, num_queries, C), or a map (bs, C, h, w), whose pixels are the queries.
            key: unused; deformable attention has no keys.
            value: what is sampled, tokens (bs, h * w, C), row by row, or a map (bs, C, h, w). None: the query.
            identity: what is added to the result, with the query's shape. None: the query, without ``query_pos``.
            query_pos: added to the query first, with its shape.
            key_padding_mask: (bs, h * w) or (bs, h, w), True where the value is padding.
            reference_points: (bs, num_queries, 2) points (x, y), or (..., 4) boxes (cx, cy, w, h), 0 to 1 over the
                value's map, padding included; or with a dimension of one level, (bs, num_queries, 1, 2 or 4). None:
                each query is a pixel of the value's map, and refers to its centre.
            spatial_shapes: (h, w) of the value's map; needed unless the value is a map. Also [(h, w)], or a tensor (1,
                2), which is read, and waited for, only where ``reference_points`` is None.
            level_start_index, **kwargs: ignored; the keywords of multi-scale attention.

        Returns:
            With the query's shape: tokens or a map.

        Raises:
            ValueError, TypeError: An argument is missing or does not fit.
        """
        map_shape = query.shape[2:] if query.dim() == 4 else None
        value = query if value is None else value
        if value.dim() == 4:
            spatial_shapes = [tuple(value.shape[2:])]
        elif spatial_shapes is None:
            raise ValueError(
                f'value is {tuple(value.shape)} and spatial_shapes None; expected a map (bs, '
                f'{self.embed_dims}, h, w), or with tokens spatial_shapes=(h, w)'
            )
        elif not isinstance(spatial_shapes, Tensor) and len(spatial_shapes) == 2 and isinstance(spatial_shapes[0], int):
            spatial_shapes = [spatial_shapes]
        query, value, identity, query_pos = (
            map_to_tokens(x) if x is not None and x.dim() == 4 else x for x in (query, value, identity, query_pos)
        )
        if reference_points is None:
            reference_points = self._pixel_centers(query, value, spatial_shapes)
        elif reference_points.dim() == 3:
            reference_points = reference_points[:, :, None]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.flatten(1)
        out = super().forward(
            query,
            value=value,
            identity=identity,
            query_pos=query_pos,
            key_padding_mask=key_padding_mask,
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
        )
        return out if map_shape is None else tokens_to_map(out, map_shape)

    @staticmethod
    def _pixel_centers(query: Tensor, value: Tensor, spatial_shapes: Tensor | Sequence[tuple[int, int]]) -> Tensor:
        """(bs, num_queries, 1, 2): each pixel's own centre."""
        if query.shape[1] != value.shape[1]:
            raise ValueError(
                f'reference_points is None, but there are {query.shape[1]} queries for the '
                f'{value.shape[1]} pixels of the value: give reference_points (bs, num_queries, 2 or 4), '
                'or a query for each pixel'
            )
        return pixel_centers(spatial_shapes, value.new_ones(len(value), 1, 2))[:, :, None]

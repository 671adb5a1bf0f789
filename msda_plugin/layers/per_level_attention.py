"""Multi-scale deformable attention to boxes, with another number of points on each level.

Sources: Lv et al., RT-DETRv2, https://arxiv.org/abs/2407.17140; Peng et al., D-FINE, https://arxiv.org/abs/2410.13842.
"""

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from msda_plugin.ops.functional import Shapes
from msda_plugin.ops.per_level import attend_per_level
from msda_plugin.registry import MODELS

METHODS = ('default', 'discrete')


@MODELS.register_module()
class PerLevelDeformableAttention(BaseModule):
    """Deformable attention of D-FINE: no projections of value and output, and ``num_points`` per level.

    Args:
        embed_dims: channels of queries and values.
        num_heads: must divide ``embed_dims``.
        num_points: points on each level, one value per level, the finest first.
        method: 'default' samples by bilinear interpolation, 'discrete' the nearest pixel; its offsets are not trained.
        offset_scale: unit of the offsets, in box sizes divided by the number of points of the level.
        init_cfg: as in MMEngine.

    Raises:
        ValueError: If ``num_heads`` does not divide ``embed_dims``, ``num_points`` is not a list of positive integers,
            or ``method`` is unknown.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_points: Sequence[int] = (4, 4, 4),
        method: str = 'default',
        offset_scale: float = 0.5,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads:
            raise ValueError(f'num_heads={num_heads} does not divide embed_dims={embed_dims}: change one of them')
        if isinstance(num_points, int) or not num_points or min(num_points) < 1:
            raise ValueError(f'num_points={num_points} is invalid; expected one positive integer per level')
        if method not in METHODS:
            raise ValueError(f'method={method!r} is unknown; expected one of {METHODS}')
        self.num_heads = num_heads
        self.num_points = tuple(num_points)
        self.method = method
        self.offset_scale = offset_scale
        total = num_heads * sum(num_points)
        self.sampling_offsets = nn.Linear(embed_dims, 2 * total)
        self.attention_weights = nn.Linear(embed_dims, total)
        scale = torch.tensor([1 / points for points in num_points for _ in range(points)])
        self.register_buffer('point_scale', scale, persistent=False)
        if method == 'discrete':
            self.sampling_offsets.requires_grad_(False)
        self.init_weights()

    def init_weights(self) -> None:
        """Offsets in one direction per head, with the distances 1 to the number of points; equal weights."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        distances = torch.cat([torch.arange(1.0, points + 1) for points in self.num_points])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((directions[:, None] * distances[:, None]).flatten())
        for parameter in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, query: Tensor, value: Tensor, boxes: Tensor, spatial_shapes: Shapes) -> Tensor:
        """Attend from each query to a few points in and around its box, on every level.

        Args:
            query: (bs, num_queries, embed_dims), with the position added.
            value: (bs, num_keys, embed_dims), the pixels of all levels, row by row.
            boxes: (bs, num_queries, 1 or num_levels, 4) as (cx, cy, w, h), 0-1 over the level.
            spatial_shapes: (h, w) of each level, as pairs of integers or (num_levels, 2) int64.

        Returns:
            (bs, num_queries, embed_dims).

        Raises:
            ValueError: If the number of levels is not that of ``num_points``.
        """
        if len(spatial_shapes) != len(self.num_points):
            raise ValueError(
                f'got {len(spatial_shapes)} levels, but num_points={self.num_points} is for {len(self.num_points)}: '
                'give num_points one value per level'
            )
        total = (*query.shape[:2], self.num_heads, sum(self.num_points))
        return attend_per_level(
            value.unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            boxes,
            self.sampling_offsets(query).view(*total, 2),
            self.attention_weights(query).view(total),
            self.num_points,
            self.point_scale * self.offset_scale,
            self.method,
        )

"""Multi-scale deformable attention with another number of points on every level.

Source: Lv et al., RT-DETRv2, https://arxiv.org/abs/2407.17140, sections 3.1 and 3.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msda_plugin.layers.multi_scale_deformable_attention import (
    MultiScaleDeformableAttention,
    Sampling,
    _batch_first_queries,
    _forward,
)
from msda_plugin.layers.reference_points import Shapes, as_shape_tensor
from msda_plugin.ops.points_per_level import METHODS, by_level, discrete_pixels, ms_deform_attn_points_per_level
from msda_plugin.registry import MODELS


@MODELS.register_module()
class PointsPerLevelAttention(MultiScaleDeformableAttention):
    """The cross-attention of RT-DETRv2: points per level, and discrete sampling.

    With the same number of points on every level and ``method='default'`` the results and the state dict are those of
    :class:`MultiScaleDeformableAttention`. Reference points are boxes.

    Args:
        num_points: number of points on each level, or one number for all levels.
        method: 'default' interpolates between pixels; 'discrete' takes the nearest pixel, and its offsets are not
            trained (for the end of a training, or a deployment without ``grid_sample``).
        offset_scale: unit of the offsets, as a multiple of the box.
        **kwargs: as for :class:`MultiScaleDeformableAttention`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 3,
        num_points: int | Sequence[int] = 4,
        method: str = 'default',
        offset_scale: float = 0.5,
        **kwargs,
    ) -> None:
        points = [num_points] * num_levels if isinstance(num_points, int) else list(num_points)
        if len(points) != num_levels or min(points) < 1:
            raise ValueError(
                f'num_points={num_points}; expected at least 1 for each of the num_levels={num_levels} levels'
            )
        if method not in METHODS:
            raise ValueError(f'method is {method!r}; expected one of {METHODS}')
        self.points_per_level = tuple(points)
        super().__init__(embed_dims, num_heads, num_levels, max(points), **kwargs)
        total = num_heads * sum(points)
        self.sampling_offsets = nn.Linear(embed_dims, 2 * total)
        self.attention_weights = nn.Linear(embed_dims, total)
        self.method = method
        scale = torch.tensor([offset_scale / count for count in points for _ in range(count)])
        self.register_buffer('offset_scale', scale, persistent=False)
        self.init_weights()
        if method == 'discrete':
            self.sampling_offsets.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize as mmcv's layer: offsets on a ray per head, of length 1, 2 ... on each level."""
        points = getattr(self, 'points_per_level', ())
        if self.sampling_offsets.out_features != 2 * self.num_heads * sum(points):
            return  # called by the constructor of the base class, before this class's layers exist
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], -1)
        rays = rays / rays.abs().max(-1, keepdim=True).values
        lengths = torch.cat([torch.arange(1, count + 1) for count in points])
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_((rays[:, None] * lengths[:, None]).flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
        for projection in (self.value_proj, self.output_proj):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)
        self._is_init = True

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
        """As :class:`MultiScaleDeformableAttention`, with boxes (bs, num_queries, num_levels, 4) as reference points.

        Raises:
            ValueError: If an argument is missing or has the wrong shape.
        """
        identity = kwargs.get('residual') if identity is None else identity
        given = (query, value, identity, query_pos, key_padding_mask, reference_points, spatial_shapes)
        return _forward(self, _attend_per_level, *given, level_start_index)

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

        Levels with fewer points than another one are filled with points of weight 0.
        """
        offsets, logits = self._project(_batch_first_queries(self, query, query_pos))
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        scale, boxes = self.offset_scale[:, None], reference_points
        if self.method == 'discrete':
            sizes = as_shape_tensor(spatial_shapes, offsets.device).flip(-1)[:, None]
            pixels = discrete_pixels(offsets, scale, boxes, spatial_shapes, self.points_per_level)
            pixels = by_level(pixels, self.points_per_level)
            locations = (pixels.to(torch.promote_types(offsets.dtype, torch.float32)) + 0.5) / sizes
        else:
            boxes = boxes[:, :, None, :, None]  # (bs, num_queries, 1, num_levels, 1, 4)
            locations = boxes[..., :2] + by_level(offsets * scale, self.points_per_level) * boxes[..., 2:]
        return Sampling(
            locations=locations,
            weights=by_level(weights[..., None], self.points_per_level)[..., 0],
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
        )

    def _project(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (bs, num_queries, num_heads, points of all levels, 2), and logits without the last dimension."""
        points = (*query.shape[:2], self.num_heads, sum(self.points_per_level))
        return self.sampling_offsets(query).view(*points, 2), self.attention_weights(query).view(points)


def _attend_per_level(
    layer: PointsPerLevelAttention,
    query: Tensor,
    value: Tensor,
    boxes: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
) -> Tensor:
    if boxes.shape[-1] != 4:
        raise ValueError(
            f'reference_points has shape {tuple(boxes.shape)}; PointsPerLevelAttention takes boxes, (bs, num_queries, '
            'num_levels, 4): use MultiScaleDeformableAttention for points'
        )
    offsets, logits = layer._project(query)
    return ms_deform_attn_points_per_level(
        value, spatial_shapes, boxes, offsets, logits, layer.points_per_level, layer.offset_scale, layer.method
    )

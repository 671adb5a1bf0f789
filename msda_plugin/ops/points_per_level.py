"""Deformable attention around boxes with another number of points on every level: RT-DETRv2 and D-FINE.

Sources: Lv et al., RT-DETRv2, https://arxiv.org/abs/2407.17140; Peng et al., D-FINE, https://arxiv.org/abs/2410.13842.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_plugin.ops.checks import shapes_from_pairs
from msda_plugin.ops.functional import Shapes, ms_deform_attn_fused

METHODS = ('default', 'discrete')


def ms_deform_attn_points_per_level(
    value: Tensor,
    spatial_shapes: Shapes,
    boxes: Tensor,
    offsets: Tensor,
    logits: Tensor,
    num_points: Sequence[int],
    scale: Tensor,
    method: str = 'default',
) -> Tensor:
    """Attend to ``num_points[level]`` points of each level; softmax over all of them together.

    Args:
        value: (bs, num_keys, num_heads, head_dim).
        spatial_shapes: (num_levels, 2) int64, (h, w) of each level; or a sequence of pairs.
        boxes: (bs, num_queries, num_levels or 1, 4), (cx, cy, w, h), 0 to 1 over the level.
        offsets: (bs, num_queries, num_heads, sum of num_points, 2), (x, y):
            ``location = xy + offset * scale * wh``.
        logits: (bs, num_queries, num_heads, sum of num_points).
        num_points: number of points on each level.
        scale: (sum of num_points,), factor of the offsets of each point, such as 0.5 / num_points[level].
        method: 'default' interpolates between pixels; 'discrete' takes the pixel whose center is nearest, without a
            gradient of its position.

    Returns:
        (bs, num_queries, num_heads * head_dim) in the value's dtype.
    """
    scale = scale.to(offsets.dtype)[:, None]
    if method == 'discrete':
        # The offset from the corner of the level to the center of a pixel is exact in floating point, and so is the
        # sample. Positions have no gradient.
        pixels = discrete_pixels(offsets.detach(), scale, boxes.detach(), spatial_shapes, num_points)
        offsets = pixels.to(torch.promote_types(offsets.dtype, torch.float32)) + 0.5
        boxes = offsets.new_zeros(()).expand(*boxes.shape[:3], 2)
    else:
        # The operator divides by the level's number of points, and multiplies by half the box.
        parts = zip(scale.split(tuple(num_points)), num_points, strict=True)
        offsets = offsets * torch.cat([part * (2 * count) for part, count in parts])
    return ms_deform_attn_fused(
        value, spatial_shapes, None, boxes.expand(-1, -1, len(num_points), -1), offsets, logits, num_points=num_points
    )


def by_level(tensor: Tensor, num_points: Sequence[int]) -> Tensor:
    """(bs, num_queries, num_heads, points of all levels, n) -> (..., num_levels, most points of a level, n)."""
    most = max(num_points)
    return torch.stack([F.pad(t, (0, 0, 0, most - t.shape[3])) for t in tensor.split(tuple(num_points), 3)], 3)


def discrete_pixels(offsets: Tensor, scale: Tensor, boxes: Tensor, shapes: Shapes, num_points: Sequence[int]) -> Tensor:
    """Pixels (x, y) that 'discrete' samples, int64, with the shape of ``offsets``; ``scale`` is (points, 1)."""
    if boxes.shape[2] > 1:
        boxes = _repeat(boxes, num_points, 2)
    boxes = boxes[:, :, None]  # (bs, num_queries, 1, points of all levels or 1, 4)
    locations = boxes[..., :2] + offsets * scale * boxes[..., 2:]
    shapes = shapes if isinstance(shapes, Tensor) else shapes_from_pairs(shapes, offsets.device)
    sizes = _repeat(shapes.flip(-1), num_points, 0)  # (points of all levels, 2), (w, h)
    pixels = (locations * sizes + 0.5).long()
    return torch.minimum(pixels.clamp(min=0), sizes - 1)


def _repeat(tensor: Tensor, num_points: Sequence[int], dim: int) -> Tensor:
    """Repeat the entry of each level in ``dim`` for its points. An index tensor would be a copy from the host."""
    parts = zip(tensor.split(1, dim), num_points, strict=True)
    return torch.cat([part.repeat_interleave(count, dim) for part, count in parts], dim)

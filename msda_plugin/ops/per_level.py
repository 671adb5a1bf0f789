"""The operator with another number of points on each level, by padding levels with points of weight 0."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.ops.functional import Shapes, ms_deform_attn_fused


def attend_per_level(
    value: Tensor,
    spatial_shapes: Shapes,
    boxes: Tensor,
    offsets: Tensor,
    logits: Tensor,
    points: Sequence[int],
    scale: Tensor,
    method: str = 'default',
) -> Tensor:
    """Deformable attention with ``points[level]`` points on each level.

    Args:
        value: (bs, num_keys, num_heads, head_dim).
        spatial_shapes: (h, w) of each level.
        boxes: (bs, num_queries, 1 or num_levels, 4) as (cx, cy, w, h), 0-1 over the level.
        offsets: (bs, num_queries, num_heads, sum(points), 2), in units of ``scale`` times the box size.
        logits: (bs, num_queries, num_heads, sum(points)); softmax over all points.
        points: number of points on each level.
        scale: (sum(points),).
        method: 'default' or 'discrete'.

    Returns:
        (bs, num_queries, num_heads * head_dim).
    """
    scale = scale.to(offsets.dtype)[:, None]
    if method == 'discrete':
        # The offset from the corner of the level to the center of a pixel is exact in floating point, and so is the
        # sample. Positions have no gradient.
        offsets = _centers(offsets.detach(), scale, boxes.detach(), spatial_shapes, points)
        boxes = offsets.new_zeros(()).expand(*boxes.shape[:2], 1, 2)
    else:
        # The operator divides by the number of points, and multiplies by half the box.
        offsets = _by_level(offsets * (scale * (2 * max(points))), points)
    return ms_deform_attn_fused(
        value,
        spatial_shapes,
        None,
        boxes.expand(*boxes.shape[:2], len(points), -1),
        offsets,
        _by_level(logits[..., None], points, -torch.inf)[..., 0],
    )


def _centers(offsets: Tensor, scale: Tensor, boxes: Tensor, shapes: Shapes, points: Sequence[int]) -> Tensor:
    """Offsets (x, y) in pixels from the corner of the level to the centers of the pixels that 'discrete' samples."""
    if boxes.shape[2] > 1:
        boxes = torch.cat([boxes[:, :, i : i + 1].expand(-1, -1, n, -1) for i, n in enumerate(points)], 2)
    locations = boxes[:, :, None, :, :2] + offsets * scale * boxes[:, :, None, :, 2:]
    sizes = torch.as_tensor(shapes, device=offsets.device).flip(-1)[:, None]  # (num_levels, 1, 2), (w, h)
    pixels = (_by_level(locations, points) * sizes + 0.5).long()
    return torch.minimum(pixels.clamp(min=0), sizes - 1).to(torch.promote_types(offsets.dtype, torch.float32)) + 0.5


def _by_level(tensor: Tensor, points: Sequence[int], fill: float = 0.0) -> Tensor:
    """(bs, num_queries, num_heads, points of all levels, n) -> (..., num_levels, most points of a level, n), filled."""
    if len(set(points)) == 1:
        return tensor.unflatten(3, (len(points), points[0]))
    most = max(points)
    return torch.stack([F.pad(t, (0, 0, 0, most - t.shape[3]), value=fill) for t in tensor.split(points, 3)], 3)

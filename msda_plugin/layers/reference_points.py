"""Coordinates of deformable attention: pixel centers, and sampling locations from reference points and offsets."""

from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = Tensor | Sequence[tuple[int, int]]


def pixel_centers(spatial_shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Centers of all pixels of all levels, relative to the unpadded part of their level.

    Args:
        spatial_shapes: (h, w) of each level. Pairs of integers cause no device synchronization; a device tensor does.
        valid_ratios: (bs, num_levels, 2), the unpadded share of each level's width and height, 0-1.

    Returns:
        (bs, num_keys, 2), (x, y), float32; above 1 in the padding.
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
    """Convert pairs (h, w) to a (num_levels, 2) int64 tensor on ``device``, without synchronization.

    Tensors are returned unchanged.
    """
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes
    return sizes_tensor(spatial_shapes, device)


def sizes_tensor(sizes: Sequence, device: torch.device) -> Tensor:
    """Convert integers, or nested sequences of them, to an int64 tensor on ``device``, without synchronization."""
    if torch.jit.is_tracing():  # sizes are tensors then, and torch.tensor would make them constants
        return torch.stack([size if isinstance(size, Tensor) else _traced(size, device) for size in sizes])
    return torch.tensor(sizes, dtype=torch.int64).to(device, non_blocking=True)


def _traced(size: int | Sequence, device: torch.device) -> Tensor:
    return torch.tensor(size, device=device) if isinstance(size, int) else sizes_tensor(size, device)


def sampling_locations(reference_points: Tensor, sampling_offsets: Tensor, spatial_shapes: Shapes) -> Tensor:
    """Sampling locations as :func:`msda_plugin.ops.ms_deform_attn_fused` computes them inside its kernels.

    Args:
        reference_points: (bs, num_queries, num_levels, 2) points (x, y) or (..., 4) boxes (cx, cy, w, h), 0-1 over the
            level.
        sampling_offsets: (bs, num_queries, num_heads, num_levels, num_points, 2), in pixels of the level with points,
            in half box sizes divided by ``num_points`` with boxes.
        spatial_shapes: (h, w) of each level.

    Returns:
        (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y), 0-1 over the level; at least float32.
    """
    offsets = sampling_offsets.to(torch.promote_types(sampling_offsets.dtype, torch.float32))
    points = reference_points[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        sizes = as_shape_tensor(spatial_shapes, offsets.device).flip(-1)  # (num_levels, 2), (w, h)
        return points + offsets / sizes[:, None]
    return points[..., :2] + offsets / offsets.shape[-2] * points[..., 2:] * 0.5

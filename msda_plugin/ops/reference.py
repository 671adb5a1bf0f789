"""Multi-scale deformable attention in plain PyTorch: the definition that every backend is tested against.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3. Every function is differentiable any
number of times, does not read tensor values on the host, and computes in float32 (float64 for a float64 value).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(value: Tensor) -> torch.dtype:
    """The dtype that every backend computes in: float64 for a float64 value, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def pad_points(
    num_points: Sequence[int], coordinates: Tensor, weights: Tensor, reference_points: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same samples with equally many points on each level: the additional ones have no weight.

    Args:
        num_points: number of points on each level.
        coordinates: (bs, num_queries, num_heads, sum(num_points), 2), sampling locations or offsets.
        weights: (bs, num_queries, num_heads, sum(num_points)), attention weights or logits.
        reference_points: as in ``ms_deform_attn_fused``, whose offsets and logits the other arguments are then. None:
            they are locations and weights.

    Returns:
        (bs, num_queries, num_heads, num_levels, max(num_points), 2) and (bs, ..., num_levels, max(num_points)).
    """
    num_points, most = list(num_points), max(num_points)
    # Additional locations are outside of the level, and additional offsets are 0, whatever the reference.
    location, weight = (-1.0, 0.0) if reference_points is None else (0.0, -torch.inf)
    levels = list(coordinates.split(num_points, 3))
    if reference_points is not None and reference_points.shape[-1] == 4:
        # Offsets from boxes are divided by the number of points.
        levels = [offsets * (most / n) for offsets, n in zip(levels, num_points, strict=True)]
    levels = [F.pad(t, (0, 0, 0, most - t.shape[3]), value=location) for t in levels]
    weights = [F.pad(t, (0, most - t.shape[3]), value=weight) for t in weights.split(num_points, 3)]
    return torch.stack(levels, 3), torch.stack(weights, 3)


def attend(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of ``value``; shapes as in :func:`msda_plugin.ops.ms_deform_attn`.

    The samples are those of ``grid_sample(mode='bilinear', padding_mode='zeros', align_corners=False)``. A location
    that is NaN or infinite, or whose four neighbors are all outside the level, contributes nothing and gets gradient 0.
    """
    dtype = accumulation_dtype(value)
    height, width = spatial_shapes[:, :1], spatial_shapes[:, 1:]  # (L, 1), against (..., L, P)
    x, y = sampling_locations.to(dtype).unbind(-1)  # (B, Q, H, L, P)
    return _sample_and_sum(
        value, height, width, level_start_index, x * width - 0.5, y * height - 0.5, attention_weights.to(dtype)
    )


def attend_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """:func:`attend` after the softmax and the location arithmetic; shapes as in ``ms_deform_attn_fused``."""
    dtype = accumulation_dtype(value)
    height, width = spatial_shapes[:, :1], spatial_shapes[:, 1:]
    weights = attention_logits.to(dtype).flatten(-2).softmax(-1).view(attention_logits.shape)
    points = reference_points.to(dtype)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    offsets = sampling_offsets.to(dtype)
    # Samples are excluded before the arithmetic, since 0 * inf would make a gradient NaN.
    with torch.no_grad():
        x, y = _pixel_coordinates(points, offsets, height, width)
        inside = _inside(x, y, height, width)[..., None]
    x, y = _pixel_coordinates(torch.where(inside, points, 0), torch.where(inside, offsets, 0), height, width)
    return _sample_and_sum(value, height, width, level_start_index, x, y, weights, inside[..., 0])


def _pixel_coordinates(points: Tensor, offsets: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Sampling positions (x, y) in pixels of the level, 0 at the center of the first pixel."""
    if points.shape[-1] == 2:
        return points[..., 0] * width + offsets[..., 0] - 0.5, points[..., 1] * height + offsets[..., 1] - 0.5
    xy = points[..., :2] + offsets * points[..., 2:] * (0.5 / offsets.shape[-2])
    return xy[..., 0] * width - 0.5, xy[..., 1] * height - 0.5


def _inside(x: Tensor, y: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Whether at least one neighbor is a pixel of the level; False for NaN."""
    return (x >= -1) & (x < width) & (y >= -1) & (y < height)


def _sample_and_sum(
    value: Tensor,
    height: Tensor,
    width: Tensor,
    level_start_index: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    inside: Tensor | None = None,
) -> Tensor:
    batch, num_keys, num_heads, head_dim = value.shape
    if inside is None:
        inside = _inside(x, y, height, width)
    x, y, weights = (torch.where(inside, t, 0) for t in (x, y, weights))
    x0, y0 = x.detach().floor(), y.detach().floor()

    # One row per (image, key, head), and a row of zeros for neighbors outside of their level.
    rows = F.pad(value.to(accumulation_dtype(value)).reshape(-1, head_dim), (0, 0, 0, 1))
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(num_heads, device=value.device).view(-1, 1, 1)
    start = level_start_index[:, None]

    output = 0
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x0 + dx, y0 + dy
            exists = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            key = start + row.long() * width + column.long()
            index = torch.where(exists, (image * num_keys + key) * num_heads + head, rows.shape[0] - 1)
            corner = weights * (1 - (x - column).abs()) * (1 - (y - row).abs())
            output = output + (F.embedding(index, rows) * corner[..., None]).sum((3, 4))  # (B, Q, H, D)
    return output.flatten(2).to(value.dtype)

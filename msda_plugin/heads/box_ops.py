"""Box formats and overlaps."""

from collections.abc import Sequence

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x1, y1, x2, y2), (..., 4)."""
    center, size = boxes.chunk(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) -> (cx, cy, w, h), (..., 4)."""
    low, high = boxes.chunk(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def box_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union, 0 to 1; shapes and ``eps`` as in :func:`generalized_box_iou`."""
    intersection, union = _intersection_and_union(a.unbind(-1), b.unbind(-1), eps)
    return intersection / union


def generalized_box_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalized IoU (https://arxiv.org/abs/1902.09630, algorithm 1), -1 to 1.

    Args:
        a, b: (..., 4) boxes (x1, y1, x2, y2), broadcast against each other: (..., N, 1, 4) and (..., 1, M, 4) give all
            pairs.
        eps: lower bound of the areas that are divided by, in the unit of the boxes.
    """
    # Separate coordinate planes vectorize over boxes; a last dimension of 4 would not.
    a, b = a.unbind(-1), b.unbind(-1)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    intersection, union = _intersection_and_union(a, b, eps)
    hull = (
        (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
        * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    ).clamp(min=eps)
    return intersection / union - (hull - union) / hull


def _intersection_and_union(a: Sequence[Tensor], b: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Areas, from the coordinate planes x1, y1, x2, y2 of both operands."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    intersection = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0) * (
        torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    ).clamp(min=0)
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection).clamp(min=eps)
    return intersection, union

"""Masks of objects at the size of the image, for exported graphs."""

import torch
from torch import Tensor
from torch.nn import functional as F


def bounding_boxes(masks: Tensor) -> Tensor:
    """Boxes (..., 4), xyxy in pixels, around masks (..., h, w) bool; 0 for an empty mask."""
    edges = []
    for pixels in (masks.float().amax(-2) > 0, masks.float().amax(-1) > 0):  # of columns, then of rows
        places = torch.arange(pixels.shape[-1], device=masks.device).to(torch.float32).expand_as(pixels)
        last = torch.where(pixels, places + 1, 0.0).amax(-1)
        first = torch.where(pixels, places, torch.inf).amin(-1)
        edges.append((torch.where(last > 0, first, 0.0), last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], -1)


def paste(masks: Tensor, boxes: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Resize the mask of each box to its place in the image, bilinearly; the same as mmdet's ``_do_paste_mask``.

    Source: He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870. The interpolation is a product with the weights
    of rows and columns, so that the graph has no GridSample.

    Args:
        masks: (n, mask height, mask width).
        boxes: (n, 4), xyxy in pixels of the image.
        height, width: Size of the image, pixels.

    Returns:
        (n, height, width), 0 outside of the boxes.
    """

    def weights(count: int, low: Tensor, high: Tensor, side: int | Tensor) -> Tensor:
        pixels = torch.arange(side, device=masks.device).to(masks.dtype) + 0.5
        places = (pixels - low[:, None]) / (high - low)[:, None] * count - 0.5  # (n, side), in pixels of the mask
        samples = torch.arange(count, device=masks.device).to(masks.dtype)
        return F.relu(1 - (places[..., None] - samples).abs())  # (n, side, count)

    x1, y1, x2, y2 = boxes.unbind(-1)
    rows = weights(masks.shape[-2], y1, y2, height)
    columns = weights(masks.shape[-1], x1, x2, width)
    return rows @ masks @ columns.transpose(1, 2)

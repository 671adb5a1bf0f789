"""Non-maximum suppression: ``nms``, ``softnms`` and ``nms_match`` of mmcv.

As in mmcv, ``offset`` is added to widths and heights, and a box that ties with another in score keeps the place that
:func:`torch.sort` gives it. float16 and bfloat16 are computed in float32.
"""

import numpy as np
import torch
from torch import Tensor

from msda_plugin.mmcv_ops.torchvision_ops import torchvision_for


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Suppress each box whose IoU with a higher-scoring kept box exceeds a threshold.

    Args:
        boxes: (n, 4), xyxy.
        scores: (n,).

    Returns:
        (num_kept,) int64, indices of the kept boxes, highest score first.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.long)
    iou_threshold = float(np.float32(iou_threshold))  # mmcv passes it as a C++ float
    order = torch.sort(scores, dim=0, descending=True).indices
    boxes = boxes[order]
    if offset == 0 and (torchvision := torchvision_for(boxes)) is not None:
        # Its own sort puts boxes with equal scores in another order, so it gets their ranks as scores.
        ranks = torch.arange(len(boxes), 0, -1, device=boxes.device, dtype=boxes.dtype)
        return order[torchvision.nms(boxes, ranks, iou_threshold)]
    if boxes.dtype not in (torch.float32, torch.float64):
        boxes = boxes.float()
    block = 128 if boxes.device.type == 'cpu' else 1024  # compared at once with all others: cache, number of launches
    kept = []
    remaining = torch.arange(len(boxes), device=boxes.device)
    while len(remaining):
        head, tail = remaining[:block], remaining[block:]
        head = head[_greedy(_iou(boxes[head], boxes[head], offset) > iou_threshold)]
        kept.append(head)
        remaining = tail[~(_iou(boxes[head], boxes[tail], offset) > iou_threshold).any(0)]
    return order[torch.cat(kept)]


def _iou(first: Tensor, second: Tensor, offset: int) -> Tensor:
    """(n, m) IoU of (n, 4) and (m, 4) boxes; NaN for two boxes without area."""
    x1, y1, x2, y2 = first.T[..., None]
    other_x1, other_y1, other_x2, other_y2 = second.T
    width = (torch.minimum(x2, other_x2) - torch.maximum(x1, other_x1)).add_(offset).clamp_(min=0)
    height = (torch.minimum(y2, other_y2) - torch.maximum(y1, other_y1)).add_(offset).clamp_(min=0)
    intersection = width.mul_(height)
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    other_area = (other_x2 - other_x1 + offset) * (other_y2 - other_y1 + offset)
    return intersection / (area + other_area - intersection)


def _greedy(overlaps: Tensor) -> Tensor:
    """Choose boxes in order, skipping those that overlap with a chosen one.

    After the i-th round the first i boxes are decided, and usually all are after a few rounds.

    Args:
        overlaps: (n, n) bool.

    Returns:
        (n,) bool.
    """
    suppresses = overlaps.triu(1).float()
    kept = suppresses.new_ones(len(overlaps))
    while True:
        updated = (kept @ suppresses == 0).float()
        if torch.equal(updated, kept):
            return kept.bool()
        kept = updated


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the score of each box by its IoU with every higher-scoring one, and drop it below a minimum.

    Args:
        boxes: (n, 4), xyxy, on the CPU.
        scores: (n,).
        dets: (n, 5), receives the kept boxes and their new scores, in its first rows.
        method: 0 drops the boxes above the threshold, 1 weights them by 1 - IoU, 2 weights all by
            exp(-IoU² / sigma).

    Returns:
        (num_kept,) int64, indices of the kept boxes, highest new score first.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.long)
    array, new_scores = _numpy(boxes), _numpy(scores).copy()
    indices = np.arange(len(array))
    count, position = len(array), 0
    with np.errstate(invalid='ignore', divide='ignore'):
        while position < count:
            best = position + _first_highest(new_scores[position:count])
            for values in (indices, new_scores):
                values[[position, best]] = values[[best, position]]
            position += 1
            rest = slice(position, count)
            iou = _iou_with_one(array[indices[position - 1]], array[indices[rest]], offset)
            if method == 2:
                new_scores[rest] *= np.exp(-(iou * iou) / iou.dtype.type(sigma))
            else:
                weights = 0 if method == 0 else 1 - iou
                new_scores[rest] *= np.where(iou >= iou_threshold, weights, 1).astype(iou.dtype)
            dropped = new_scores[rest] < min_score
            count -= int(dropped.sum())
            # As mmcv does, the last boxes take the places of the dropped ones; it decides among equal scores.
            places = position + np.flatnonzero(dropped[: count - position])
            last = count + np.flatnonzero(~dropped[count - position :])[::-1]
            for values in (indices, new_scores):
                values[places] = values[last]
    kept = torch.from_numpy(indices[:count])
    dets[:count, :4] = boxes[kept]
    dets[:count, 4] = torch.from_numpy(new_scores[:count])
    return kept


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group each kept box with the boxes that it suppresses.

    Args:
        dets: (n, 5), xyxy and score, on the CPU.

    Returns:
        One list of indices per kept box, each sorted by score; the kept box comes first.
    """
    order = torch.sort(dets[:, 4], dim=0, descending=True).indices.numpy()
    array, groups = _numpy(dets), []
    with np.errstate(invalid='ignore', divide='ignore'):
        while len(order):
            first, order = order[0], order[1:]
            suppressed = _iou_with_one(array[first, :4], array[order, :4], 0) >= iou_threshold
            groups.append([int(first), *order[suppressed].tolist()])
            order = order[~suppressed]
    return groups


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()).numpy()


def _first_highest(scores: np.ndarray) -> int:
    best = int(scores.argmax())
    if np.isnan(scores[best]):  # from boxes without area; mmcv's comparisons skip them, except in the first place
        best = 0 if np.isnan(scores[0]) else int(np.nanargmax(scores))
    return best


def _iou_with_one(box: np.ndarray, boxes: np.ndarray, offset: int) -> np.ndarray:
    """(n,) IoU of a (4,) box with (n, 4) boxes."""
    x1, y1, x2, y2 = boxes.T
    width = np.maximum(np.minimum(box[2], x2) - np.maximum(box[0], x1) + offset, 0)
    height = np.maximum(np.minimum(box[3], y2) - np.maximum(box[1], y1) + offset, 0)
    intersection = width * height
    area = (box[2] - box[0] + offset) * (box[3] - box[1] + offset)
    return intersection / (area + (x2 - x1 + offset) * (y2 - y1 + offset) - intersection)

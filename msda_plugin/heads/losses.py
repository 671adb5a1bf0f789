"""Classification losses over all queries of a batch, for all decoder layers at once.

Few queries have an object, so the losses take the matched pairs instead of one target per query.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logits: Tensor, positives: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (https://arxiv.org/abs/1708.02002, equation 5), summed per row.

    Args:
        logits: (L, M).
        positives: (L, N) indices of the entries whose target is 1; all others are 0.

    Returns:
        (L,)
    """
    # All entries as negatives, then a correction for the positives: no one-hot targets.
    correction = _focal_correction(logits.gather(1, positives), alpha, gamma)
    return _focal_negative(logits, alpha, gamma).sum(1) + correction.sum(1)


def _focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    return (1 - alpha) * logits.sigmoid().pow(gamma) * F.softplus(logits)


def _focal_correction(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Loss of entries as positives minus their loss as negatives."""
    return alpha * (-logits).sigmoid().pow(gamma) * F.softplus(-logits) - _focal_negative(logits, alpha, gamma)


def quality_focal_loss(logits: Tensor, positives: Tensor, qualities: Tensor, beta: float) -> Tensor:
    """Focal loss whose positive targets are the IoUs of the predicted boxes, summed per row.

    Source: Li et al., Generalized Focal Loss, https://arxiv.org/abs/2006.04388, equation 3.

    Args:
        logits: (L, M).
        positives: (L, N) indices of the entries with an object; the target of all others is 0.
        qualities: (L, N) targets of the positives, 0 to 1: IoU of the predicted and the true box.

    Returns:
        (L,)
    """
    chosen = logits.gather(1, positives)
    distance = (qualities - chosen.sigmoid()).abs().pow(beta)
    correction = distance * (F.softplus(chosen) - qualities * chosen) - _quality_negative(chosen, beta)
    return _quality_negative(logits, beta).sum(1) + correction.sum(1)


def _quality_negative(logits: Tensor, beta: float) -> Tensor:
    return logits.sigmoid().pow(beta) * F.softplus(logits)


def cross_entropy(logits: Tensor, matched: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Softmax cross-entropy in which queries without an object belong to the last class, summed per row.

    Args:
        logits: (L, M, C); the last class is no object.
        matched: (L, N) indices of the queries with an object.
        labels: (L, N) int64 classes of these objects.
        weight: (C,) weight of each class.

    Returns:
        (L,)
    """
    targets = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device).scatter(1, matched, labels)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight, reduction='none').view_as(targets).sum(1)

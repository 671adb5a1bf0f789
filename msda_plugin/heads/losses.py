"""Classification losses of all queries of a batch, for every decoder layer at once.

Objects are few among the queries: both losses take the pairs that were matched, not a target for each query.
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
    # Everything as if it were negative, then the few positives exchanged: no one-hot targets.
    exchange = _focal_exchange(logits.gather(1, positives), alpha, gamma)
    return _focal_negative(logits, alpha, gamma).sum(1) + exchange.sum(1)


def _focal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    return (1 - alpha) * logits.sigmoid().pow(gamma) * F.softplus(logits)


def _focal_exchange(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """The loss of these entries as positives, less their loss as negatives."""
    return alpha * (-logits).sigmoid().pow(gamma) * F.softplus(-logits) - _focal_negative(logits, alpha, gamma)


def cross_entropy(logits: Tensor, matched: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Softmax cross-entropy in which queries without an object belong to the last class, summed per row.

    Args:
        logits: (L, M, C), C counting the class of no object.
        matched: (L, N) indices of the queries that have an object.
        labels: (L, N) int64, their classes.
        weight: (C,), of the true class of each query.

    Returns:
        (L,)
    """
    targets = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device).scatter(1, matched, labels)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight, reduction='none').view_as(targets).sum(1)

"""Classification losses over all queries of a batch, for all decoder layers at once.

Few queries have an object, so the losses take the matched pairs instead of one target per query.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS


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


def varifocal_loss(logits: Tensor, positives: Tensor, qualities: Tensor, alpha: float, gamma: float) -> Tensor:
    """Binary cross-entropy with the IoUs of the predicted boxes as positive targets and as their weights.

    Source: Zhang et al., VarifocalNet, https://arxiv.org/abs/2008.13367, equation 2. As in RT-DETR, the weights have no
    gradient; in MMDetection's loss, those of the negatives have one.

    Args:
        logits: (L, M).
        positives: (L, N) indices of the entries with an object; the target of all others is 0.
        qualities: (L, N) targets of the positives, 0 to 1: IoU of the predicted and the true box.

    Returns:
        (L,)
    """
    chosen = logits.gather(1, positives)
    # All entries as negatives, then a correction for the positives.
    correction = qualities * (F.softplus(chosen) - qualities * chosen) - _varifocal_negative(chosen, alpha, gamma)
    return _varifocal_negative(logits, alpha, gamma).sum(1) + correction.sum(1)


def _varifocal_negative(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    return alpha * logits.detach().sigmoid().pow(gamma) * F.softplus(logits)


@MODELS.register_module()
class VarifocalLoss(nn.Module):
    """RT-DETR's varifocal loss, :func:`varifocal_loss`, for the heads of this package, which read its fields.

    Args:
        alpha: weight of the negatives.
        gamma: exponent of their scores.
        loss_weight: factor of the loss.
        use_sigmoid: must be True.

    Raises:
        ValueError: If ``use_sigmoid`` is False.
    """

    reduction = 'mean'

    def __init__(
        self, alpha: float = 0.75, gamma: float = 2.0, loss_weight: float = 1.0, use_sigmoid: bool = True
    ) -> None:
        super().__init__()
        if not use_sigmoid:
            raise ValueError('use_sigmoid=False: the varifocal loss is defined for sigmoid scores; set it to True')
        self.alpha = alpha
        self.gamma = gamma
        self.loss_weight = loss_weight
        self.use_sigmoid = use_sigmoid

    def forward(self, logits: Tensor, positives: Tensor, qualities: Tensor) -> Tensor:
        """Weighted sums per row; arguments as for :func:`varifocal_loss`."""
        return self.loss_weight * varifocal_loss(logits, positives, qualities, self.alpha, self.gamma)


@MODELS.register_module()
class MatchabilityAwareLoss(nn.Module):
    """DEIM's classification loss: like :class:`VarifocalLoss`, but poor matches count as much as good ones.

    Source: Huang et al., DEIM, https://arxiv.org/abs/2412.04234, equation 3. The targets of the positives are powers of
    their IoUs.

    Args:
        gamma: exponent of the IoUs, and of the scores of the negatives.
        alpha: weight of the negatives.
        loss_weight: factor of the loss.
    """

    use_sigmoid = True
    reduction = 'mean'

    def __init__(self, gamma: float = 1.5, alpha: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, positives: Tensor, qualities: Tensor) -> Tensor:
        """Weighted sums per row; arguments as for :func:`varifocal_loss`."""
        chosen, targets = logits.gather(1, positives), qualities.pow(self.gamma)
        negatives = _varifocal_negative(logits, self.alpha, self.gamma).sum(1)
        correction = F.softplus(chosen) - targets * chosen - _varifocal_negative(chosen, self.alpha, self.gamma)
        return self.loss_weight * (negatives + correction.sum(1))


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

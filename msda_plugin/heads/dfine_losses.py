"""D-FINE's losses of the distributions of the box edges, for all decoder layers at once.

Source: Peng et al., D-FINE, https://arxiv.org/abs/2410.13842.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS


@MODELS.register_module()
class FineGrainedLocalizationLoss(nn.Module):
    """D-FINE's FGL: cross-entropy of a distribution to the two bins around the target, weighted by the IoU.

    Args:
        loss_weight: weight of the loss.
    """

    def __init__(self, loss_weight: float = 0.15) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, targets: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """Sum over edges and boxes.

        Args:
            logits: (L, N, 4, num_bins), distributions of the edges.
            targets: (N, 4) distances; those outside the range of ``values`` count as its ends.
            values: (num_bins,) increasing distances of the bins.
            weights: (L, N) weights of the boxes.

        Returns:
            (L,)
        """
        left = (torch.searchsorted(values, targets, right=True) - 1).clamp(0, len(values) - 2)
        share = ((targets - values[left]) / (values[left + 1] - values[left])).clamp(0, 1)
        log_p = logits.log_softmax(-1)
        left = left.expand(len(logits), -1, -1)[..., None]
        p_left, p_right = log_p.gather(-1, left)[..., 0], log_p.gather(-1, left + 1)[..., 0]
        return -self.loss_weight * (((1 - share) * p_left + share * p_right).sum(-1) * weights).sum(1)


@MODELS.register_module()
class DecoupledDistillationFocalLoss(nn.Module):
    """D-FINE's DDF: the distributions of earlier layers learn from those of the last one.

    Matched and unmatched queries are averaged separately, and weighted by the square roots of their numbers.

    Args:
        loss_weight: weight of the loss.
        temperature: of the softmax of both distributions.
    """

    def __init__(self, loss_weight: float = 1.5, temperature: float = 5.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.temperature = temperature

    def forward(self, logits: Tensor, teacher: Tensor, weights: Tensor, matched: Tensor, share: float) -> Tensor:
        """Kullback-Leibler divergence of each layer.

        Args:
            logits: (L, M, 4, num_bins), distributions of the edges.
            teacher: (M, 4, num_bins), logits of the last layer; they get no gradient.
            weights: (L, M) weights of the queries.
            matched: (M,) bool, queries with an object.
            share: weight of the matched queries in the loss, 0-1; the rest is that of the unmatched.

        Returns:
            (L,)
        """
        t = self.temperature
        divergence = F.kl_div(
            (logits / t).log_softmax(-1), (teacher.detach() / t).softmax(-1).expand_as(logits), reduction='none'
        )
        per_query = weights * divergence.sum((-1, -2)) * (t * t / 4)
        matched = matched.to(per_query.dtype)
        mean_matched = (per_query * matched).sum(1) / matched.sum().clamp(min=1)
        mean_unmatched = (per_query * (1 - matched)).sum(1) / (1 - matched).sum().clamp(min=1)
        return self.loss_weight * (share * mean_matched + (1 - share) * mean_unmatched)

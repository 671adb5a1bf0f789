"""The losses of RT-DETR's head, beside the golden numbers of tests/convert/test_convert_rtdetr.py."""

import pytest
import torch
from torch.nn import functional as F

from msda_plugin.heads import RTDETRHead, VarifocalLoss
from msda_plugin.heads.losses import varifocal_loss


def dense_varifocal_loss(logits, positives, qualities, alpha, gamma):
    """The definition, with a target for every entry."""
    is_positive = torch.zeros_like(logits).scatter(1, positives, 1)
    targets = torch.zeros_like(logits).scatter(1, positives, qualities)
    weights = alpha * logits.detach().sigmoid() ** gamma * (1 - is_positive) + targets
    return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction='none').sum(1)


def test_varifocal_loss():
    torch.manual_seed(0)
    logits = torch.randn(3, 40, dtype=torch.float64)
    positives = torch.stack([torch.randperm(40)[:6] for _ in range(3)])
    qualities = torch.rand(3, 6, dtype=torch.float64)
    qualities[0, 0] = 0  # a positive whose box does not overlap has no weight
    results = []
    for loss in (varifocal_loss, dense_varifocal_loss):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, positives, qualities, 0.75, 2.0)
        value.sum().backward()
        results.append((value, leaf.grad))
    assert torch.allclose(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])
    module = VarifocalLoss(loss_weight=2.0)
    assert torch.allclose(module(logits, positives, qualities), 2 * results[1][0])


def test_varifocal_loss_is_for_sigmoid_scores():
    with pytest.raises(ValueError, match='use_sigmoid=False'):
        VarifocalLoss(use_sigmoid=False)


@pytest.mark.parametrize('fields', [dict(share_pred_layer=True), dict(as_two_stage=False)])
def test_branches_are_not_shared(fields):
    with pytest.raises(ValueError, match='every layer of RTDETRHead has its own branches'):
        RTDETRHead(5, 32, **fields)

"""The losses of RT-DETR's head, beside the golden numbers of tests/convert/test_convert_rtdetr.py."""

import pytest
import torch
from mmengine.structures import InstanceData
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


@pytest.mark.parametrize(
    'loss_cls',
    [
        dict(type='msda_plugin.VarifocalLoss', alpha=0.75, gamma=2.0),
        dict(type='msda_plugin.MatchabilityAwareLoss', gamma=1.5),
        dict(type='mmdet.QualityFocalLoss', use_sigmoid=True, beta=2.0),
        dict(type='mmdet.FocalLoss', use_sigmoid=True),
    ],
    ids=lambda loss: loss['type'],
)
def test_losses_of_one_image_and_one_layer(loss_cls):
    """A single query is matched with the only object: the loss is that of its logits, with its IoU as quality."""
    head = RTDETRHead(3, 32, num_pred_layer=2, loss_cls=dict(loss_cls, loss_weight=2.0))
    logits, box = torch.tensor([[[[0.3, -1.0, 0.8]]]]), torch.tensor([[[[0.5, 0.5, 0.4, 0.2]]]])
    instances = InstanceData(bboxes=torch.tensor([[30.0, 40.0, 70.0, 80.0]]), labels=torch.tensor([2]))
    found = head.loss_by_feat(logits, box, None, None, [instances], [dict(img_shape=(100, 100))])
    iou = 0.5  # 40 x 20 pixels within 40 x 40
    probability, target = logits[0, 0, 0].sigmoid(), torch.tensor([0.0, 0.0, 1.0])
    if 'Varifocal' in loss_cls['type']:
        quality, weight = target * iou, 0.75 * probability**2 * (1 - target) + target * iou
    elif 'Matchability' in loss_cls['type']:
        quality, weight = target * iou**1.5, probability**1.5 * (1 - target) + target
    elif 'Quality' in loss_cls['type']:
        quality, weight = target * iou, (target * iou - probability).abs() ** 2
    else:
        quality, weight = target, (0.25 * target + 0.75 * (1 - target)) * (target - probability).abs() ** 2
    expected = 2 * F.binary_cross_entropy(probability, quality, weight, reduction='sum')
    assert torch.allclose(found['loss_cls'], expected)

"""Bipartite matching of predictions and objects: all decoder layers and images at once, one transfer to the host.

Source: Carion et al., DETR, https://arxiv.org/abs/2005.12872, equation 1; costs as in Deformable DETR.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.models.task_modules.assigners import HungarianAssigner
from mmdet.models.task_modules.assigners.match_cost import BBoxL1Cost, ClassificationCost, FocalLossCost, IoUCost
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Cost = FocalLossCost | ClassificationCost | BBoxL1Cost | IoUCost


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, padded to the largest number T of any image.

    Attributes:
        labels: (B, T) int64, 0 to num_classes - 1.
        boxes: (B, T, 4) as (cx, cy, w, h), 0 to 1 over the image.
        sizes: (B, 1, 4), (w, h, w, h) of each image in pixels.
        counts: how many objects each image has.
    """

    labels: Tensor
    boxes: Tensor
    sizes: Tensor
    counts: list[int]

    @classmethod
    def from_instances(
        cls, instances: Sequence[InstanceData], metas: Sequence[dict], device: torch.device
    ) -> 'Targets':
        """Collect ``labels`` and ``bboxes`` (x1, y1, x2, y2, pixels) of each image, whose ``img_shape`` is (h, w)."""
        sizes = torch.tensor(
            [[width, height] * 2 for height, width in (meta['img_shape'][:2] for meta in metas)], dtype=torch.float32
        ).to(device, non_blocking=True)[:, None]
        corners = pad_sequence([instance.bboxes for instance in instances], batch_first=True).float() / sizes
        low, high = corners.chunk(2, -1)
        return cls(
            labels=pad_sequence([instance.labels for instance in instances], batch_first=True),
            boxes=torch.cat([(low + high) / 2, high - low], -1),
            sizes=sizes,
            counts=[len(instance.labels) for instance in instances],
        )


@dataclass(frozen=True)
class Matches:
    """Matched pairs of each of L layers, N a layer, image after image.

    Attributes:
        predictions: (L, N) indices into the B * Q predictions of a layer.
        targets: (L, N) indices into the B * T padded targets.
    """

    predictions: Tensor
    targets: Tensor


class HungarianMatcher:
    """What MMDetection's ``HungarianAssigner`` does for one image and layer, for all of them together.

    Args:
        match_costs: built costs, each one of ``FocalLossCost``, ``ClassificationCost``, ``BBoxL1Cost`` and ``IoUCost``
            with ``giou``.
        num_classes: labels are 0 to num_classes - 1; logits may have one class more, for no object.

    Attributes:
        uses_softmax: whether a class's cost depends on the logits of the other classes.
    """

    def __init__(self, match_costs: Sequence[Cost], num_classes: int) -> None:
        self.match_costs = match_costs
        self.num_classes = num_classes
        self.uses_softmax = any(isinstance(cost, ClassificationCost) for cost in match_costs)

    @staticmethod
    def why_not(assigner: object) -> str:
        """An empty string, or what this matcher lacks to stand in for ``assigner``."""
        if type(assigner) is not HungarianAssigner:
            return f'the assigner is {type(assigner).__name__}'
        for cost in assigner.match_costs:
            if type(cost) not in (FocalLossCost, ClassificationCost, BBoxL1Cost, IoUCost):
                return f'a matching cost is {type(cost).__name__}'
            if getattr(cost, 'binary_input', False) or getattr(cost, 'iou_mode', 'giou') != 'giou':
                return f'a {type(cost).__name__} has other settings than binary_input=False or iou_mode="giou"'
        return ''

    @torch.no_grad()
    def match(self, groups: Sequence[tuple[Tensor, Tensor, Targets]]) -> list[Matches]:
        """Match the predictions of each group to its objects, at the lowest sum of costs.

        Args:
            groups: logits (L, B, Q, C), boxes (L, B, Q, 4) as (cx, cy, w, h), 0 to 1 over the image, and targets; L, Q
                and C may differ from group to group.

        Raises:
            ValueError: a label is not among the classes.
            FloatingPointError: predictions or boxes are NaN or infinite.
        """
        costs = [self.costs(*group) for group in groups]
        # The one transfer to the host.
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        if not np.isfinite(on_host).all():
            self._explain(groups)
        splits = np.split(on_host, np.cumsum([cost.numel() for cost in costs])[:-1])
        return [
            assign(split.reshape(cost.shape), targets.counts, cost.device)
            for split, cost, (_, _, targets) in zip(splits, costs, groups, strict=True)
        ]

    def costs(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Costs of all pairs, (L, B, T, Q); NaN where a label is not among the classes."""
        total = 0
        for cost in self.match_costs:
            if isinstance(cost, FocalLossCost):
                total = total + cost.weight * focal_cost(logits, targets.labels, cost.alpha, cost.gamma, cost.eps)
            elif isinstance(cost, ClassificationCost):
                total = total - cost.weight * pick_classes(logits.softmax(-1).transpose(-1, -2), targets.labels)
            elif isinstance(cost, BBoxL1Cost):
                expected, predicted = targets.boxes, boxes
                if cost.box_format == 'xyxy':
                    expected, predicted = corners(expected), corners(predicted)
                total = total + cost.weight * torch.cdist(expected.expand(len(boxes), -1, -1, -1), predicted, p=1)
            else:
                # In pixels: the overlap's guard against division by zero is absolute.
                overlap = generalized_iou(
                    corners(targets.boxes * targets.sizes)[:, :, None], corners(boxes * targets.sizes)[:, :, None]
                )
                total = total - cost.weight * overlap
        unknown = (targets.labels < 0) | (targets.labels >= self.num_classes)
        return total.masked_fill(unknown[..., None], float('nan'))

    def _explain(self, groups: Sequence[tuple[Tensor, Tensor, Targets]]) -> None:
        """Raise the error that tells why costs are not finite."""
        for _, _, targets in groups:
            if targets.labels.min() < 0 or targets.labels.max() >= self.num_classes:
                raise ValueError(
                    f'the ground truth has labels from {targets.labels.min()} to {targets.labels.max()}, '
                    f'but with num_classes={self.num_classes} they must be 0 to {self.num_classes - 1}: '
                    "check num_classes and the dataset's metainfo"
                )
            if not targets.boxes.isfinite().all():
                raise ValueError(
                    'the ground truth has boxes that are NaN or infinite, or an img_shape of 0: check the '
                    'annotations and the pipeline'
                )
        raise FloatingPointError(
            'the predictions are NaN or infinite, so that nothing can be matched: training has '
            'diverged; lower the learning rate or clip the gradients'
        )


def assign(costs: np.ndarray, counts: Sequence[int], device: torch.device) -> Matches:
    """Solve the assignments of host ``costs`` (L, B, T, Q), where image b has ``counts[b]`` objects."""
    num_layers, _, num_targets, num_queries = costs.shape
    pairs = [
        linear_sum_assignment(costs[layer, image, :count])
        for layer in range(num_layers)
        for image, count in enumerate(counts)
    ]
    images = np.tile(np.arange(len(counts)), num_layers)
    predictions = np.concatenate([image * num_queries + query for image, (_, query) in zip(images, pairs, strict=True)])
    targets = np.concatenate([image * num_targets + target for image, (target, _) in zip(images, pairs, strict=True)])
    both = torch.from_numpy(np.stack([predictions, targets]).astype(np.int64).reshape(2, num_layers, -1))
    return Matches(*both.to(device, non_blocking=True).unbind())


def pick_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """The scores of each target's class: (L, B, C, Q), and labels (B, T) clamped to 0 .. C - 1 -> (L, B, T, Q)."""
    index = labels.clamp(0, scores.shape[2] - 1)[None, :, :, None].expand(len(scores), -1, -1, scores.shape[3])
    return scores.gather(2, index)


def focal_cost(logits: Tensor, labels: Tensor, alpha: float, gamma: float, eps: float) -> Tensor:
    """What the focal loss would gain by calling a query its target's class.

    Args:
        logits: (L, B, Q, C).
        labels: (B, T) int64, clamped to 0 .. C - 1.

    Returns:
        (L, B, T, Q)
    """
    logits = logits.transpose(-1, -2)
    # Work on the smaller of classes and targets.
    few_targets = labels.shape[1] < logits.shape[2]
    if few_targets:
        logits = pick_classes(logits, labels)
    p = logits.sigmoid()
    cost = -(p + eps).log() * alpha * (1 - p).pow(gamma) + (1 - p + eps).log() * (1 - alpha) * p.pow(gamma)
    return cost if few_targets else pick_classes(cost, labels)


def corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x1, y1, x2, y2), (..., 4)."""
    center, size = boxes.chunk(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union of corner boxes, 0 to 1; shapes and ``eps`` as in ``generalized_iou``."""
    intersection, union = _intersection_and_union(a.unbind(-1), b.unbind(-1), eps)
    return intersection / union


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (https://arxiv.org/abs/1902.09630, algorithm 1) of corner boxes, -1 to 1.

    Args:
        a, b: (x1, y1, x2, y2). With shapes (..., N, 1, 4) and (..., 1, M, 4), of all pairs; with equal ones, of each
            pair.
        eps: the smallest area to divide by, in the boxes' unit.
    """
    # Coordinate planes: a last dimension of 4 would leave the vector units idle.
    a, b = a.unbind(-1), b.unbind(-1)
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    intersection, union = _intersection_and_union(a, b, eps)
    hull = (
        (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
        * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    ).clamp(min=eps)
    return intersection / union - (hull - union) / hull


def _intersection_and_union(a: Sequence[Tensor], b: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Areas, from the four coordinate planes of each."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    intersection = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0) * (
        torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    ).clamp(min=0)
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection).clamp(min=eps)
    return intersection, union

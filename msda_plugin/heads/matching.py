"""Bipartite matching of predictions and objects, for all decoder layers and images with one transfer to the host.

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

from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou

Cost = FocalLossCost | ClassificationCost | BBoxL1Cost | IoUCost


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, padded to the largest number T of objects in an image.

    Attributes:
        labels: (B, T) int64, 0 to num_classes - 1.
        boxes: (B, T, 4) as (cx, cy, w, h), 0 to 1 over the image.
        sizes: (B, 1, 4), (w, h, w, h) of each image in pixels.
        counts: number of objects in each image.
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
        boxes = pad_sequence([instance.bboxes for instance in instances], batch_first=True).float() / sizes
        return cls(
            labels=pad_sequence([instance.labels for instance in instances], batch_first=True),
            boxes=box_xyxy_to_cxcywh(boxes),
            sizes=sizes,
            counts=[len(instance.labels) for instance in instances],
        )


@dataclass(frozen=True)
class Matches:
    """Matched pairs of L layers, N pairs per layer, ordered by image.

    Attributes:
        predictions: (L, N) indices into the B * Q predictions of a layer.
        targets: (L, N) indices into the B * T padded targets.
    """

    predictions: Tensor
    targets: Tensor


class HungarianMatcher:
    """MMDetection's ``HungarianAssigner``, batched over images and layers.

    Args:
        match_costs: built costs: ``FocalLossCost``, ``ClassificationCost``, ``BBoxL1Cost``, and ``IoUCost`` with
            ``iou_mode='giou'``.
        num_classes: labels are 0 to num_classes - 1; logits may have an additional class, for no object.

    Attributes:
        uses_softmax: whether a class's cost depends on the logits of the other classes.
        accepts_non_finite: whether NaN predictions get any match, so that the loss is NaN, instead of an error.
    """

    accepts_non_finite = False  # set by compat.match_non_finite_predictions

    def __init__(self, match_costs: Sequence[Cost], num_classes: int) -> None:
        self.match_costs = match_costs
        self.num_classes = num_classes
        self.uses_softmax = any(isinstance(cost, ClassificationCost) for cost in match_costs)

    @staticmethod
    def unsupported_reason(assigner: object) -> str:
        """Why this matcher cannot replace ``assigner``; an empty string if it can."""
        if type(assigner) is not HungarianAssigner:
            return f'the assigner is {type(assigner).__name__}'
        for cost in assigner.match_costs:
            if type(cost) not in (FocalLossCost, ClassificationCost, BBoxL1Cost, IoUCost):
                return f'a matching cost is {type(cost).__name__}'
            if getattr(cost, 'binary_input', False) or getattr(cost, 'iou_mode', 'giou') != 'giou':
                return f'a {type(cost).__name__} has settings other than binary_input=False and iou_mode="giou"'
        return ''

    @torch.no_grad()
    def match(self, groups: Sequence[tuple[Tensor, Tensor, Targets]]) -> list[Matches]:
        """Match the predictions of each group to its objects so that the sum of costs is lowest.

        Args:
            groups: logits (L, B, Q, C), boxes (L, B, Q, 4) as (cx, cy, w, h), 0 to 1 over the image, and targets; L, Q
                and C may differ between groups.

        Raises:
            ValueError: If a label is not a class index, or a ground-truth box is NaN or infinite.
            FloatingPointError: If predictions are NaN or infinite, and not ``accepts_non_finite``.
        """
        costs = [self.costs(*group) for group in groups]
        # The only transfer to the host.
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        if not np.isfinite(on_host).all():
            self._raise_not_finite(groups)
            on_host = np.nan_to_num(on_host)
        splits = np.split(on_host, np.cumsum([cost.numel() for cost in costs])[:-1])
        return [
            assign(split.reshape(cost.shape), targets.counts, cost.device)
            for split, cost, (_, _, targets) in zip(splits, costs, groups, strict=True)
        ]

    def costs(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Costs of all pairs, (L, B, T, Q); NaN where a label is not a class index."""
        total = 0
        for cost in self.match_costs:
            if isinstance(cost, FocalLossCost):
                total = total + cost.weight * focal_cost(logits, targets.labels, cost.alpha, cost.gamma, cost.eps)
            elif isinstance(cost, ClassificationCost):
                total = total - cost.weight * pick_classes(logits.softmax(-1).transpose(-1, -2), targets.labels)
            elif isinstance(cost, BBoxL1Cost):
                expected, predicted = targets.boxes, boxes
                if cost.box_format == 'xyxy':
                    expected, predicted = box_cxcywh_to_xyxy(expected), box_cxcywh_to_xyxy(predicted)
                total = total + cost.weight * torch.cdist(expected.expand(len(boxes), -1, -1, -1), predicted, p=1)
            else:
                # In pixels, because eps of the IoU is an absolute area.
                overlap = generalized_box_iou(
                    box_cxcywh_to_xyxy(targets.boxes * targets.sizes)[:, :, None],
                    box_cxcywh_to_xyxy(boxes * targets.sizes)[:, :, None],
                )
                total = total - cost.weight * overlap
        unknown = (targets.labels < 0) | (targets.labels >= self.num_classes)
        return total.masked_fill(unknown[..., None], float('nan'))

    def _raise_not_finite(self, groups: Sequence[tuple[Tensor, Tensor, Targets]]) -> None:
        """Raise the error that explains why costs are not finite, unless the predictions are and this is accepted."""
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
        if not self.accepts_non_finite:
            raise FloatingPointError(
                'the predictions are NaN or infinite: training has diverged; lower the learning rate or clip the '
                'gradients'
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
    """Scores (L, B, C, Q) of each target's class, for labels (B, T), clamped to 0 .. C - 1 -> (L, B, T, Q)."""
    index = labels.clamp(0, scores.shape[2] - 1)[None, :, :, None].expand(len(scores), -1, -1, scores.shape[3])
    return scores.gather(2, index)


def focal_cost(logits: Tensor, labels: Tensor, alpha: float, gamma: float, eps: float) -> Tensor:
    """Focal loss of a query with the target's class as positive, minus its loss as negative.

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

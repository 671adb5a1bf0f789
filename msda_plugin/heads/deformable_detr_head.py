"""The head of Deformable DETR, with its losses over all decoder layers at once.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159. Branches, fields and loss values are
MMDetection's.
"""
import logging
from dataclasses import replace

import torch
from mmdet.models.dense_heads.deformable_detr_head import DeformableDETRHead as MMDetDeformableDETRHead
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.losses import FocalLoss, GIoULoss, L1Loss
from mmdet.utils import reduce_mean
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.heads.matching import HungarianMatcher, Matches, Targets, corners, generalized_iou
from msda_plugin.registry import MODELS

EPS = torch.finfo(torch.float32).eps  # what MMDetection's losses add to the number they divide by


@MODELS.register_module()
class DeformableDETRHead(MMDetDeformableDETRHead):
    """MMDetection's head: same fields, same parameters, same losses, without the work per layer and image.

    Matching costs of all layers and images are one batch and one transfer to the host; losses are computed for all
    layers together. This covers ``HungarianAssigner`` with ``FocalLossCost``, ``BBoxL1Cost`` and ``IoUCost``
    (``giou``), and ``FocalLoss``, ``L1Loss`` and ``GIoULoss`` with ``reduction='mean'``. For anything else
    MMDetection's own code runs, and the log says so once, when the head is built.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.matcher = None
        if self.train_cfg:
            why_not = HungarianMatcher.why_not(self.assigner) or self._why_not_batched()
            if why_not:
                print_log(f'{type(self).__name__} computes its losses layer by layer with MMDetection\'s code, because '
                          f'{why_not}', logger='current', level=logging.WARNING)
            else:
                self.matcher = HungarianMatcher(self.assigner.match_costs)

    def _why_not_batched(self) -> str:
        """An empty string, or which loss the batched code does not cover."""
        for loss, covered in ((self.loss_cls, FocalLoss), (self.loss_bbox, L1Loss), (self.loss_iou, GIoULoss)):
            if type(loss) is not covered or loss.reduction != 'mean' or getattr(loss, 'activated', False):
                return f'a loss is {loss}, not a {covered.__name__} of logits with reduction="mean"'
        return ''

    def forward(self, hidden_states: Tensor, references: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Classify the queries and place their boxes, after every decoder layer.

        Args:
            hidden_states: (num_layers, bs, num_queries, embed_dims).
            references: what each layer started from, (bs, num_queries, 2 or 4), 0 to 1; entries past the last layer
                are not used.

        Returns:
            Logits (num_layers, bs, num_queries, cls_out_channels) and boxes (num_layers, bs, num_queries, 4) as
            (cx, cy, w, h), 0 to 1 over the image.
        """
        if self.share_pred_layer:
            logits, deltas = self.cls_branches[0](hidden_states), self.reg_branches[0](hidden_states)
        else:
            logits = torch.stack([branch(x) for branch, x in zip(self.cls_branches, hidden_states, strict=False)])
            deltas = torch.stack([branch(x) for branch, x in zip(self.reg_branches, hidden_states, strict=False)])
        # A reference of two coordinates is a centre: width and height come from the deltas alone.
        start = torch.stack([F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
                             for reference in references[:len(hidden_states)]])
        return logits, (deltas + start).sigmoid()

    def loss_by_feat(self,
                     all_layers_cls_scores: Tensor,
                     all_layers_bbox_preds: Tensor,
                     enc_cls_scores: Tensor | None,
                     enc_bbox_preds: Tensor | None,
                     batch_gt_instances: list[InstanceData],
                     batch_img_metas: list[dict],
                     batch_gt_instances_ignore: None = None) -> dict[str, Tensor]:
        """Losses of every decoder layer and, in a two-stage model, of the encoder's proposals.

        Args:
            all_layers_cls_scores: logits (num_layers, bs, num_queries, num_classes).
            all_layers_bbox_preds: (num_layers, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the image.
            enc_cls_scores: logits (bs, num_keys, num_classes), or None; every object counts as class 0.
            enc_bbox_preds: (bs, num_keys, 4), or None.
            batch_gt_instances: per image ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,); n may
                be 0.
            batch_img_metas: per image ``img_shape`` (h, w).
            batch_gt_instances_ignore: must be None.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou`` of the last layer, ``d0.loss_cls`` ... of the earlier
            ones, ``enc_loss_cls`` ... of the proposals.
        """
        if self.matcher is None:
            return super().loss_by_feat(all_layers_cls_scores, all_layers_bbox_preds, enc_cls_scores, enc_bbox_preds,
                                        batch_gt_instances, batch_img_metas, batch_gt_instances_ignore)
        if batch_gt_instances_ignore is not None:
            raise ValueError('batch_gt_instances_ignore must be None: DETR heads have no regions to ignore')
        targets = Targets.from_instances(batch_gt_instances, batch_img_metas, all_layers_cls_scores.device)
        decoded = (all_layers_cls_scores.float(), all_layers_bbox_preds.float(), targets)
        groups = [decoded]
        if enc_cls_scores is not None:
            objectness = replace(targets, labels=torch.zeros_like(targets.labels))
            proposed = (enc_cls_scores.float()[None], enc_bbox_preds.float()[None], objectness)
            groups.append((proposed[0][..., :1], *proposed[1:]))  # costs need no other class than 0
        matches = self.matcher.match(groups)

        losses = self._losses(*decoded, matches[0])
        loss_dict = {f'loss_{name}': loss[-1] for name, loss in losses.items()}
        for i in range(len(all_layers_cls_scores) - 1):
            loss_dict |= {f'd{i}.loss_{name}': loss[i] for name, loss in losses.items()}
        if enc_cls_scores is not None:
            losses = self._losses(*proposed, matches[1])
            loss_dict |= {f'enc_loss_{name}': loss[0] for name, loss in losses.items()}
        return loss_dict

    def _losses(self, logits: Tensor, boxes: Tensor, targets: Targets,
                matches: Matches) -> dict[str, tuple[Tensor, ...]]:
        """``cls``, ``bbox`` and ``iou`` loss of each layer, from (L, B, Q, C), (L, B, Q, 4) and N pairs a layer."""
        num_layers, num_matches = matches.predictions.shape
        num_boxes = reduce_mean(boxes.new_full((), num_matches)).clamp(min=1)
        num_positives = num_boxes if self.sync_cls_avg_factor else max(num_matches, 1)

        labels = targets.labels.flatten()[matches.targets]  # (L, N)
        index = matches.predictions * logits.shape[-1] + labels
        loss_cls = focal_loss(logits.flatten(1), index, self.loss_cls.alpha, self.loss_cls.gamma)

        # (L, N, 4)
        predicted = boxes.flatten(1, 2).gather(1, matches.predictions[..., None].expand(-1, -1, 4))
        expected = targets.boxes.flatten(0, 1)[matches.targets]
        sizes = targets.sizes.expand_as(targets.boxes).flatten(0, 1)[matches.targets]
        loss_bbox = (predicted - expected).abs().sum((1, 2))
        # In pixels: the overlap's guard against division by zero is absolute.
        overlap = generalized_iou(corners(predicted * sizes), corners(expected * sizes), self.loss_iou.eps)
        loss_iou = (1 - overlap).sum(1)
        return {'cls': (self.loss_cls.loss_weight / (num_positives + EPS) * loss_cls).unbind(),
                'bbox': (self.loss_bbox.loss_weight / (num_boxes + EPS) * loss_bbox).unbind(),
                'iou': (self.loss_iou.loss_weight / (num_boxes + EPS) * loss_iou).unbind()}


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

"""Shared by the heads of DETR and Deformable DETR: batched losses, non-maximum suppression, checkpoints."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from mmcv.ops import batched_nms
from mmdet.models.losses import CrossEntropyLoss, FocalLoss, GIoULoss, L1Loss, QualityFocalLoss
from mmdet.utils import reduce_mean
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor, nn

from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy, box_iou, generalized_box_iou
from msda_plugin.heads.losses import MatchabilityAwareLoss, VarifocalLoss, cross_entropy, focal_loss, quality_focal_loss
from msda_plugin.heads.matching import HungarianMatcher, Matches, Targets

EPS = torch.finfo(torch.float32).eps  # MMDetection's losses add it to their divisor
QUALITY_LOSSES = (VarifocalLoss, MatchabilityAwareLoss)


class SetPrediction:
    """Mixin for subclasses of MMDetection's ``DETRHead``; must precede it in the list of bases.

    Losses: matching costs of all layers and images are computed in one batch and copied to the host once; losses are
    computed for all layers together. This covers ``HungarianAssigner`` with ``FocalLossCost`` or
    ``ClassificationCost``, ``BBoxL1Cost`` and ``IoUCost`` (``giou``), and ``FocalLoss``, ``QualityFocalLoss``,
    :class:`VarifocalLoss`, :class:`MatchabilityAwareLoss` or softmax ``CrossEntropyLoss``, ``L1Loss`` and ``GIoULoss``
    with ``reduction='mean'``. Other configs run MMDetection's code, with a warning when the head is built.

    Predictions: a converged DETR needs no non-maximum suppression. After a short training, duplicates are its main
    error; ``test_cfg=dict(nms=dict(type='nms', iou_threshold=0.7))`` removes them within each class.

    Checkpoints: a class layer with another number of outputs is an error, with every loader. A training can start from
    such a checkpoint (`msda_plugin.heads.class_layers.adapt_class_layers`).

    Attributes:
        matcher: None where MMDetection's code computes the losses.
    """

    matcher: HungarianMatcher | None

    def init_set_prediction(self) -> None:
        """Choose how the losses are computed; to be called at the end of ``__init__``."""
        self.matcher = None
        if self.train_cfg:
            reason = HungarianMatcher.unsupported_reason(self.assigner) or self._unsupported_loss_reason()
            if reason:
                print_log(
                    f"{type(self).__name__} computes its losses layer by layer with MMDetection's code, because "
                    f'{reason}',
                    logger='current',
                    level=logging.WARNING,
                )
            else:
                self.matcher = HungarianMatcher(self.assigner.match_costs, self.num_classes)
        nms = self.test_cfg.get('nms')
        if nms is not None and not (isinstance(nms, dict) and 0 < nms.get('iou_threshold', -1) <= 1):
            raise ValueError(
                f"test_cfg.nms is {nms}; expected dict(type='nms', iou_threshold=…) with a threshold above 0 and up to "
                '1. Leave nms out for no suppression'
            )
        if isinstance(self.loss_cls, CrossEntropyLoss):
            weight = self.loss_cls.class_weight
            weight = torch.ones(self.cls_out_channels) if weight is None else torch.as_tensor(weight).float()
            self.register_buffer('class_weight', weight, persistent=False)

    def _unsupported_loss_reason(self) -> str:
        """Which loss the batched code does not cover; an empty string if it covers all of them."""
        for loss, covered in (
            (self.loss_cls, (FocalLoss, QualityFocalLoss, *QUALITY_LOSSES, CrossEntropyLoss)),
            (self.loss_bbox, (L1Loss,)),
            (self.loss_iou, (GIoULoss,)),
        ):
            if type(loss) not in covered or loss.reduction != 'mean' or getattr(loss, 'activated', False):
                names = ' or '.join(kind.__name__ for kind in covered)
                return f'a loss is {loss}, not a {names} of logits with reduction="mean"'
        if isinstance(self.loss_cls, CrossEntropyLoss) and (
            self.loss_cls.use_sigmoid or self.loss_cls.use_mask or self.loss_cls.ignore_index is not None
        ):
            return 'a CrossEntropyLoss has settings other than use_sigmoid=False and ignore_index=None'
        return ''

    @staticmethod
    def check_nothing_ignored(instances_ignore: object) -> None:
        """Raise ValueError unless ``instances_ignore`` is None."""
        if instances_ignore is not None:
            raise ValueError('batch_gt_instances_ignore must be None: DETR heads do not support ignored regions')

    # ---- losses ------------------------------------------------------------------------------------------------------
    def batched_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        instances: Sequence[InstanceData],
        metas: Sequence[dict],
        proposals: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of every decoder layer and, in a two-stage model, of the encoder's proposals.

        Args:
            logits: (num_layers, bs, num_queries, cls_out_channels).
            boxes: (num_layers, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the image.
            instances: ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,) of each image; n may be 0.
            metas: ``img_shape`` (h, w) of each image.
            proposals: logits (bs, num_keys, cls_out_channels) and boxes (bs, num_keys, 4); the target class of every
                object is 0.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou`` of the last layer, ``d0.loss_cls`` ... of the earlier
            ones, ``enc_loss_cls`` ... of the proposals.
        """
        targets = Targets.from_instances(instances, metas, logits.device)
        decoded = (logits.float(), boxes.float(), targets)
        groups = [decoded]
        if proposals is not None:
            proposed = (
                *(prediction.float()[None] for prediction in proposals),
                replace(targets, labels=torch.zeros_like(targets.labels)),
            )
            # Without a softmax over classes, the costs depend on class 0 only.
            groups.append(proposed if self.matcher.uses_softmax else (proposed[0][..., :1], *proposed[1:]))
        matches = self.matcher.match(groups)

        losses = self._losses(*decoded, matches[0])
        loss_dict = {f'loss_{name}': loss[-1] for name, loss in losses.items()}
        for i in range(len(logits) - 1):
            loss_dict |= {f'd{i}.loss_{name}': loss[i] for name, loss in losses.items()}
        if proposals is not None:
            losses = self._losses(*proposed, matches[1])
            loss_dict |= {f'enc_loss_{name}': loss[0] for name, loss in losses.items()}
        return loss_dict

    def _losses(
        self, logits: Tensor, boxes: Tensor, targets: Targets, matches: Matches, num_boxes: Tensor | None = None
    ) -> dict[str, tuple[Tensor, ...]]:
        """``cls``, ``bbox`` and ``iou`` loss of each layer, from (L, B, Q, C), (L, B, Q, 4) and N pairs per layer.

        All of them are divided by ``num_boxes``, if given, instead of by the number of pairs and of classified queries.
        """
        num_matches = matches.predictions.shape[1]
        num_unmatched = logits.shape[1] * logits.shape[2] - num_matches
        # Unmatched queries count with the weight of the no-object class.
        totals = torch.stack(
            [boxes.new_full((), num_matches), boxes.new_full((), num_matches + num_unmatched * self.bg_cls_weight)]
        )
        if num_boxes is not None:
            num_classified = num_boxes
        elif self.sync_cls_avg_factor:
            num_boxes, num_classified = reduce_mean(totals).clamp(min=1)
        else:
            num_boxes, num_classified = reduce_mean(totals[0]).clamp(min=1), totals[1].clamp(min=1)

        labels = targets.labels.flatten()[matches.targets]  # (L, N)
        # (L, N, 4)
        predicted = boxes.flatten(1, 2).gather(1, matches.predictions[..., None].expand(-1, -1, 4))
        expected = targets.boxes.flatten(0, 1)[matches.targets]
        sizes = targets.sizes.expand_as(targets.boxes).flatten(0, 1)[matches.targets]

        weight = self.loss_cls.loss_weight
        if self.loss_cls.use_sigmoid:
            index, flat = matches.predictions * logits.shape[-1] + labels, logits.flatten(1)
            if isinstance(self.loss_cls, (QualityFocalLoss, *QUALITY_LOSSES)):
                quality = box_iou(box_cxcywh_to_xyxy(predicted.detach()), box_cxcywh_to_xyxy(expected))
            if isinstance(self.loss_cls, QUALITY_LOSSES):
                loss_cls = self.loss_cls(flat, index, quality)
            elif isinstance(self.loss_cls, QualityFocalLoss):
                loss_cls = weight * quality_focal_loss(flat, index, quality, self.loss_cls.beta)
            else:
                loss_cls = weight * focal_loss(flat, index, self.loss_cls.alpha, self.loss_cls.gamma)
        else:
            loss_cls = weight * cross_entropy(
                logits.flatten(1, 2), matches.predictions, labels, self.class_weight.float()
            )

        loss_bbox = (predicted - expected).abs().sum((1, 2))
        # In pixels, because eps of the IoU is an absolute area.
        overlap = generalized_box_iou(
            box_cxcywh_to_xyxy(predicted * sizes), box_cxcywh_to_xyxy(expected * sizes), self.loss_iou.eps
        )
        loss_iou = (1 - overlap).sum(1)
        return {
            'cls': (loss_cls / (num_classified + EPS)).unbind(),
            'bbox': (self.loss_bbox.loss_weight / (num_boxes + EPS) * loss_bbox).unbind(),
            'iou': (self.loss_iou.loss_weight / (num_boxes + EPS) * loss_iou).unbind(),
        }

    # ---- predictions -------------------------------------------------------------------------------------------------
    def _predict_by_feat_single(
        self, cls_score: Tensor, bbox_pred: Tensor, img_meta: dict, rescale: bool = True
    ) -> InstanceData:
        """MMDetection's predictions of an image, after non-maximum suppression per class if ``test_cfg.nms`` is set."""
        results = super()._predict_by_feat_single(cls_score, bbox_pred, img_meta, rescale)
        nms = self.test_cfg.get('nms')
        if nms is None or len(results) == 0:
            return results
        _, kept = batched_nms(results.bboxes, results.scores, results.labels, nms)
        return results[kept]

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def resized_class_layers(self, state_dict: dict[str, Tensor], prefix: str = '') -> dict[str, tuple[int, int]]:
        """``{name: (outputs in state_dict, outputs here)}`` of the class layers with another number of outputs."""
        resized = {}
        for name, layer in self.named_modules(remove_duplicate=False):
            if name.split('.')[0] not in ('cls_branches', 'fc_cls', 'denoising') or not isinstance(
                layer, (nn.Linear, nn.Embedding)
            ):
                continue
            stored = state_dict.get(f'{prefix}{name}.weight')
            if stored is not None and stored.shape[1:] == layer.weight.shape[1:] and len(stored) != len(layer.weight):
                resized[prefix + name] = len(stored), len(layer.weight)
        return resized

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Refuse class layers of another size. (MMEngine's loader would log them and leave the layers untrained.)"""
        resized = self.resized_class_layers(state_dict, prefix)
        if resized:
            name, (stored, expected) = next(iter(resized.items()))
            others = f' (and {len(resized) - 1} more)' if len(resized) > 1 else ''
            raise RuntimeError(
                f'size mismatch for {name}.weight{others}: the checkpoint was trained with another number of classes '
                f'({stored} outputs, the model has {expected}); set num_classes as in its training, or fine-tune from '
                'it with load_from and msda_plugin.DetectionRunner'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

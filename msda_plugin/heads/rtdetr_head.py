"""The head of RT-DETR.

Source: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", https://arxiv.org/abs/2304.08069; losses and
matching are those of the authors' code.
"""

import copy

from mmdet.structures import DetDataSample
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor

from msda_plugin.heads.deformable_detr_head import DeformableDETRHead
from msda_plugin.heads.detr_head import GIOU, L1
from msda_plugin.heads.matching import HungarianMatcher, Matches, Targets
from msda_plugin.layers.denoising import ContrastiveDenoising, DenoisingQueries
from msda_plugin.registry import MODELS

VARIFOCAL = dict(type='msda_plugin.VarifocalLoss', alpha=0.75, gamma=2.0, loss_weight=1.0)
MATCHING = dict(
    assigner=dict(
        type='mmdet.HungarianAssigner',
        match_costs=[
            dict(type='mmdet.FocalLossCost', weight=2.0, alpha=0.25, gamma=2.0),
            dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
            dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
        ],
    )
)
TOP_300 = dict(max_per_img=300)


@MODELS.register_module()
class RTDETRHead(DeformableDETRHead):
    """The branches, the denoising queries and the losses of RT-DETR.

    Losses of the decoder layers, of the selected proposals and of the denoising queries are divided by the number of
    objects of the batch (times the number of denoising groups), averaged over processes.

    Args:
        num_classes: number of object classes.
        embed_dims: channels of the decoder's outputs.
        num_reg_fcs: linear layers of the box branch before its last one.
        loss_cls, loss_bbox, loss_iou: configs; ``loss_cls`` is :class:`VarifocalLoss` or another sigmoid loss that
            :class:`SetPrediction` supports.
        train_cfg: ``assigner``, the config of the matching; None: the authors' costs.
        test_cfg: ``max_per_img``, number of boxes per image; ``nms``, as in :class:`DETRHead`.
        init_cfg: as in MMEngine.
        num_pred_layer: number of branches; the last one scores the encoder's proposals.
        dn_cfg: fields of :class:`ContrastiveDenoising`; None: training without denoising.
        share_pred_layer, as_two_stage: must be False and True, as the detector sets them.

    The detector sets ``num_pred_layer`` and ``dn_cfg``.

    Raises:
        ValueError: If losses, assigner or shared branches are not supported, or ``test_cfg.nms`` has no
            ``iou_threshold`` above 0 and up to 1.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int = 256,
        num_reg_fcs: int = 2,
        loss_cls: dict = VARIFOCAL,
        loss_bbox: dict = L1,
        loss_iou: dict = GIOU,
        train_cfg: dict | None = MATCHING,
        test_cfg: dict | None = TOP_300,
        init_cfg: dict | list[dict] | None = None,
        *,
        num_pred_layer: int = 7,
        dn_cfg: dict | None = None,
        share_pred_layer: bool = False,
        as_two_stage: bool = True,
    ) -> None:
        super().__init__(
            num_classes,
            embed_dims,
            num_reg_fcs,
            True,  # sync_cls_avg_factor
            loss_cls,
            loss_bbox,
            loss_iou,
            copy.deepcopy(train_cfg or MATCHING),
            test_cfg,
            init_cfg,
            share_pred_layer=share_pred_layer,
            num_pred_layer=num_pred_layer,
            as_two_stage=as_two_stage,
        )
        if share_pred_layer or not as_two_stage:
            raise ValueError(
                f'share_pred_layer={share_pred_layer} and as_two_stage={as_two_stage}; every layer of RTDETRHead has '
                'its own branches, and the encoder proposes queries: leave out both fields'
            )
        if not self.loss_cls.use_sigmoid:
            raise ValueError(f'loss_cls is {loss_cls}; RTDETRHead needs a sigmoid loss, such as {VARIFOCAL}')
        reason = HungarianMatcher.unsupported_reason(self.assigner) or self._unsupported_loss_reason()
        if reason:
            raise ValueError(f'RTDETRHead does not support this config: {reason}')
        self.denoising = None if dn_cfg is None else ContrastiveDenoising(num_classes, embed_dims, **dn_cfg)

    def denoising_queries(self, samples: list[DetDataSample], num_queries: int) -> DenoisingQueries | None:
        """Denoising queries of a batch with ``gt_instances``; None without ``dn_cfg``."""
        if self.denoising is None:
            return None
        targets = Targets.from_instances(*_ground_truth(samples), self.cls_branches[0].weight.device)
        return self.denoising(targets.labels, targets.boxes, targets.counts, num_queries)

    def loss(
        self,
        hidden_states: Tensor,
        references: list[Tensor],
        enc_outputs_class: Tensor,
        enc_outputs_coord: Tensor,
        batch_data_samples: list[DetDataSample],
        denoising: DenoisingQueries | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            hidden_states, references: as for :meth:`forward`; denoising queries come first.
            enc_outputs_class: logits (bs, num_queries, num_classes) of the selected proposals.
            enc_outputs_coord: (bs, num_queries, 4), their boxes.
            batch_data_samples: hold ``gt_instances`` and ``img_shape`` of each image.
            denoising: the denoising queries.

        Returns:
            As :meth:`loss_by_feat`.
        """
        return self.loss_by_feat(
            *self(hidden_states, references),
            enc_outputs_class,
            enc_outputs_coord,
            *_ground_truth(batch_data_samples),
            denoising=denoising,
        )

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        enc_cls_scores: Tensor | None,
        enc_bbox_preds: Tensor | None,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: None = None,
        denoising: DenoisingQueries | None = None,
    ) -> dict[str, Tensor]:
        """Losses of every decoder layer, of the selected proposals, and of the denoising queries.

        Args:
            all_layers_cls_scores: logits (num_layers, bs, num_queries, num_classes); denoising queries come first.
            all_layers_bbox_preds: (num_layers, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the image.
            enc_cls_scores: logits (bs, num_proposals, num_classes), or None.
            enc_bbox_preds: (bs, num_proposals, 4), or None.
            batch_gt_instances: ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,) of each image; n may
                be 0.
            batch_img_metas: ``img_shape`` (h, w) of each image.
            batch_gt_instances_ignore: must be None.
            denoising: the denoising queries.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou`` of the last layer, ``d0.loss_cls`` ... of the earlier
            ones, ``enc_loss_cls`` ... of the proposals, ``dn_loss_cls``, ``d0.dn_loss_cls`` ... of the denoising.
        """
        self.check_nothing_ignored(batch_gt_instances_ignore)
        logits, boxes = all_layers_cls_scores.float(), all_layers_bbox_preds.float()
        targets = Targets.from_instances(batch_gt_instances, batch_img_metas, logits.device)
        num_boxes = reduce_mean(boxes.new_tensor(float(sum(targets.counts)))).clamp(min=1)
        loss_dict = {}
        if denoising is not None:
            noisy = logits[:, :, : len(denoising)], boxes[:, :, : len(denoising)]
            logits, boxes = logits[:, :, len(denoising) :], boxes[:, :, len(denoising) :]
            pairs = denoising.positives(targets.counts, targets.labels.shape[1])
            matches = Matches(*(index.expand(len(logits), -1) for index in pairs))
            losses = self._losses(*noisy, targets, matches, num_boxes * denoising.num_groups)
            loss_dict |= _named(losses, 'dn_loss_')
        groups = [(logits, boxes, targets)]
        if enc_cls_scores is not None:
            groups.append((enc_cls_scores.float()[None], enc_bbox_preds.float()[None], targets))
        matches = self.matcher.match(groups)
        loss_dict |= _named(self._losses(*groups[0], matches[0], num_boxes), 'loss_')
        if enc_cls_scores is not None:
            loss_dict |= _named(self._losses(*groups[1], matches[1], num_boxes), 'enc_loss_')
        return loss_dict


def _ground_truth(samples: list[DetDataSample]) -> tuple[list[InstanceData], list[dict]]:
    return [sample.gt_instances for sample in samples], [sample.metainfo for sample in samples]


def _named(losses: dict[str, tuple[Tensor, ...]], prefix: str) -> dict[str, Tensor]:
    """Losses of each layer, by name: those of the last layer first, without its number."""
    named = {f'{prefix}{name}': loss[-1] for name, loss in losses.items()}
    for i in range(len(next(iter(losses.values()))) - 1):
        named |= {f'd{i}.{prefix}{name}': loss[i] for name, loss in losses.items()}
    return named

"""The head of Deformable DETR, with its losses over all decoder layers at once.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159. Branches, fields and loss values are
MMDetection's.
"""

import torch
from mmdet.models.dense_heads.deformable_detr_head import DeformableDETRHead as MMDetDeformableDETRHead
from mmdet.models.layers import inverse_sigmoid
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.heads.detr_head import GIOU, L1, MATCHING, TOP_100
from msda_plugin.heads.set_prediction import SetPrediction
from msda_plugin.registry import MODELS

FOCAL = dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0)


@MODELS.register_module()
class DeformableDETRHead(SetPrediction, MMDetDeformableDETRHead):
    """MMDetection's head (same fields, parameters and losses) with the losses batched over layers and images.

    Args:
        num_classes: number of object classes; with a softmax loss the class layer has an additional output, for no
            object.
        embed_dims: channels of the decoder's outputs.
        num_reg_fcs: linear layers of the box branch before its last one.
        sync_cls_avg_factor: average the divisor of the classification loss over processes.
        loss_cls, loss_bbox, loss_iou: configs.
        train_cfg, test_cfg: as in :class:`DETRHead`.
        init_cfg: as in MMEngine.
        share_pred_layer: all decoder layers share one class and one box branch.
        num_pred_layer: number of branches; in a two-stage model the last one scores the encoder's proposals.
        as_two_stage: the head belongs to a two-stage model.

    The detector sets the last three fields.

    Raises:
        ValueError: If ``test_cfg.nms`` has no ``iou_threshold`` above 0 and up to 1.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int = 256,
        num_reg_fcs: int = 2,
        sync_cls_avg_factor: bool = False,
        loss_cls: dict = FOCAL,
        loss_bbox: dict = L1,
        loss_iou: dict = GIOU,
        train_cfg: dict | None = MATCHING,
        test_cfg: dict | None = TOP_100,
        init_cfg: dict | list[dict] | None = None,
        *,
        share_pred_layer: bool = False,
        num_pred_layer: int = 6,
        as_two_stage: bool = False,
    ) -> None:
        super().__init__(
            num_classes,
            embed_dims,
            num_reg_fcs,
            sync_cls_avg_factor,
            loss_cls,
            loss_bbox,
            loss_iou,
            train_cfg,
            test_cfg or {},
            init_cfg,
            share_pred_layer=share_pred_layer,
            num_pred_layer=num_pred_layer,
            as_two_stage=as_two_stage,
        )
        self.init_set_prediction()

    def forward(self, hidden_states: Tensor, references: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes of the queries after every decoder layer.

        Args:
            hidden_states: (num_layers, bs, num_queries, embed_dims).
            references: reference points of each layer, (bs, num_queries, 2 or 4), 0 to 1; entries past the last layer
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
        # A reference of two coordinates is a center; width and height then come from the deltas alone.
        start = torch.stack(
            [
                F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
                for reference in references[: len(hidden_states)]
            ]
        )
        return logits, (deltas + start).sigmoid()

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        enc_cls_scores: Tensor | None,
        enc_bbox_preds: Tensor | None,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: None = None,
    ) -> dict[str, Tensor]:
        """Losses of every decoder layer and, in a two-stage model, of the encoder's proposals.

        Args:
            all_layers_cls_scores: logits (num_layers, bs, num_queries, num_classes).
            all_layers_bbox_preds: (num_layers, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the image.
            enc_cls_scores: logits (bs, num_keys, num_classes), or None; the target class of every object is 0.
            enc_bbox_preds: (bs, num_keys, 4), or None.
            batch_gt_instances: ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,) of each image; n may
                be 0.
            batch_img_metas: ``img_shape`` (h, w) of each image.
            batch_gt_instances_ignore: must be None.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou`` of the last layer, ``d0.loss_cls`` ... of the earlier
            ones, ``enc_loss_cls`` ... of the proposals.
        """
        if self.matcher is None:
            return super().loss_by_feat(
                all_layers_cls_scores,
                all_layers_bbox_preds,
                enc_cls_scores,
                enc_bbox_preds,
                batch_gt_instances,
                batch_img_metas,
                batch_gt_instances_ignore,
            )
        self.check_nothing_ignored(batch_gt_instances_ignore)
        proposals = None if enc_cls_scores is None else (enc_cls_scores, enc_bbox_preds)
        return self.batched_losses(
            all_layers_cls_scores, all_layers_bbox_preds, batch_gt_instances, batch_img_metas, proposals
        )

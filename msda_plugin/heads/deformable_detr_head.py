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

from msda_plugin.heads.set_prediction import SetPrediction
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DeformableDETRHead(SetPrediction, MMDetDeformableDETRHead):
    """MMDetection's head: same fields, same parameters, same losses, without the work per layer and image."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.init_set_prediction()

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

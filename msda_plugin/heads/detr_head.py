"""The head of DETR, with its losses over all decoder layers at once.

Source: Carion et al., DETR, https://arxiv.org/abs/2005.12872. Layers, fields and loss values are MMDetection's.
"""

from numbers import Real

from mmdet.models.dense_heads.detr_head import DETRHead as MMDetDETRHead
from mmengine.structures import InstanceData
from torch import Tensor

from msda_plugin.heads.set_prediction import SetPrediction
from msda_plugin.registry import MODELS

CLASSIFICATION = dict(type='mmdet.CrossEntropyLoss', bg_cls_weight=0.1, class_weight=1.0)
L1 = dict(type='mmdet.L1Loss', loss_weight=5.0)
GIOU = dict(type='mmdet.GIoULoss', loss_weight=2.0)
MATCHING = dict(
    assigner=dict(
        type='mmdet.HungarianAssigner',
        match_costs=[
            dict(type='mmdet.ClassificationCost', weight=1.0),
            dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
            dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
        ],
    )
)
TOP_100 = dict(max_per_img=100)


@MODELS.register_module()
class DETRHead(SetPrediction, MMDetDETRHead):
    """MMDetection's head (same fields, parameters and losses) with the losses batched over layers and images.

    Args:
        num_classes: number of object classes; with a softmax loss the class layer has an additional output, for no
            object.
        embed_dims: channels of the decoder's outputs.
        num_reg_fcs: linear layers of the box branch before its last one.
        sync_cls_avg_factor: average the divisor of the classification loss over processes.
        loss_cls: config; ``class_weight`` is the weight of every object class, ``bg_cls_weight`` that of no object.
        loss_bbox, loss_iou: configs.
        train_cfg: ``assigner``, the config of the matching; None if the head is not trained.
        test_cfg: ``max_per_img``, number of boxes per image; ``nms``, config of non-maximum suppression within each
            class, as for mmcv's ``batched_nms``.
        init_cfg: as in MMEngine.

    Raises:
        TypeError: If ``class_weight`` or ``bg_cls_weight`` is not a number.
        ValueError: If ``test_cfg.nms`` has no ``iou_threshold`` above 0 and up to 1.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int = 256,
        num_reg_fcs: int = 2,
        sync_cls_avg_factor: bool = False,
        loss_cls: dict = CLASSIFICATION,
        loss_bbox: dict = L1,
        loss_iou: dict = GIOU,
        train_cfg: dict | None = MATCHING,
        test_cfg: dict | None = TOP_100,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        loss_cls, background = _class_weights(loss_cls, num_classes)
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
        )
        self.bg_cls_weight = background
        self.init_set_prediction()

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: None = None,
    ) -> dict[str, Tensor]:
        """Losses of every decoder layer.

        Args:
            all_layers_cls_scores: logits (num_layers, bs, num_queries, cls_out_channels).
            all_layers_bbox_preds: (num_layers, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the image.
            batch_gt_instances: ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,) of each image; n may
                be 0.
            batch_img_metas: ``img_shape`` (h, w) of each image.
            batch_gt_instances_ignore: must be None.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou`` of the last layer, ``d0.loss_cls`` ... of the earlier
            ones.
        """
        if self.matcher is None:
            return super().loss_by_feat(
                all_layers_cls_scores,
                all_layers_bbox_preds,
                batch_gt_instances,
                batch_img_metas,
                batch_gt_instances_ignore,
            )
        self.check_nothing_ignored(batch_gt_instances_ignore)
        return self.batched_losses(all_layers_cls_scores, all_layers_bbox_preds, batch_gt_instances, batch_img_metas)


def _class_weights(loss_cls: dict, num_classes: int) -> tuple[dict, float]:
    """The config with one weight per class, no object last, and the weight of no object."""
    weight = loss_cls.get('class_weight')
    if weight is None:
        return loss_cls, 0
    background = loss_cls.get('bg_cls_weight', weight)
    for name, value in (('class_weight', weight), ('bg_cls_weight', background)):
        if not isinstance(value, Real):
            raise TypeError(
                f'loss_cls.{name} is {value!r}; expected a number: class_weight for all object classes, '
                'bg_cls_weight for no object'
            )
    loss_cls = {name: value for name, value in loss_cls.items() if name != 'bg_cls_weight'}
    return loss_cls | dict(class_weight=[float(weight)] * num_classes + [float(background)]), float(background)

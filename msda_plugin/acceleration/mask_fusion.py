"""Instance masks of MaskFormer and Mask2Former in MMDetection, one query at a time.

The stock head computes about ten tensors of all masks in the size of the image, 430 MB each for 100 queries at
800x1344: with a fast model, most of the time. One mask at a time stays in the cache.
"""

import torch
from mmdet.structures import SampleList
from mmdet.structures.mask import mask2bbox
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F


class MaskFusion(nn.Module):
    """``MaskFormerFusionHead``, whose instances are computed one query at a time on CPUs."""

    def predict(
        self,
        mask_cls_results: Tensor,
        mask_pred_results: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = False,
        **kwargs,
    ) -> list[dict]:
        """As in the stock class; masks are rescaled one at a time, unless there are panoptic results.

        Args:
            mask_cls_results: (bs, num_queries, num_classes + 1), logits.
            mask_pred_results: (bs, num_queries, h, w), logits.
            batch_data_samples: hold ``img_shape`` and ``ori_shape``.
            rescale: Whether results have the size of ``ori_shape``.
            **kwargs: ignored, as in the stock class.
        """
        wanted = [self.test_cfg.get(name, name == 'panoptic_on') for name in ('panoptic_on', 'semantic_on')]
        if any(wanted) or not self.test_cfg.get('instance_on', False) or mask_pred_results.device.type != 'cpu':
            return super().predict(mask_cls_results, mask_pred_results, batch_data_samples, rescale, **kwargs)
        results = []
        for classes, masks, sample in zip(mask_cls_results, mask_pred_results, batch_data_samples, strict=True):
            height, width = sample.img_shape[:2]
            size = tuple(sample.ori_shape[:2]) if rescale else None
            results.append(dict(ins_results=_instances(self, classes, masks[:, :height, :width], size)))
        return results

    def instance_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> InstanceData:
        """(num_queries, num_classes + 1) and (num_queries, h, w) logits -> instances, as in the stock class."""
        if mask_pred.device.type != 'cpu':
            return super().instance_postprocess(mask_cls, mask_pred)
        return _instances(self, mask_cls, mask_pred, None)


def _instances(head: nn.Module, mask_cls: Tensor, mask_pred: Tensor, size: tuple[int, int] | None) -> InstanceData:
    """The instances of an image, with masks in ``size``; None: that of ``mask_pred``."""
    scores = F.softmax(mask_cls, dim=-1)[:, :-1]
    scores, indices = scores.flatten().topk(head.test_cfg.get('max_per_image', 100), sorted=False)
    labels = indices % head.num_classes
    things = labels < head.num_things_classes
    # A query occurs once for each of its classes.
    queries, which = (indices // head.num_classes)[things].unique(return_inverse=True)
    masks = mask_pred.new_empty((len(queries), *(size or mask_pred.shape[1:])), dtype=torch.bool)
    boxes, means = mask_pred.new_empty((len(queries), 4), dtype=torch.float32), []
    for i, query in enumerate(queries.tolist()):
        logits = mask_pred[query]
        if size is not None:
            logits = F.interpolate(logits[None, None], size=size, mode='bilinear', align_corners=False)[0, 0]
        masks[i] = logits > 0
        inside = masks[i].float()
        means.append((logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        boxes[i] = mask2bbox(masks[i : i + 1])[0]
    scores = scores[things]
    return InstanceData(
        bboxes=boxes[which],
        labels=labels[things],
        scores=scores * torch.stack(means)[which] if means else scores,
        masks=masks[which],
    )

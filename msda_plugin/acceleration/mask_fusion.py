"""Instance masks of MaskFormer and Mask2Former in MMDetection, one query at a time.

The stock code computes about ten tensors of all masks in the size of the image, 430 MB each for 100 queries at
800x1344: with a fast model, most of the time. One mask at a time stays in the cache.
"""

import torch
from mmdet.models.dense_heads import MaskFormerHead
from mmdet.structures import SampleList
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]  # (h, w)


class MaskFormer(nn.Module):
    """``MaskFormer`` and ``Mask2Former``, whose masks reach :class:`MaskFusion` before they are enlarged."""

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True) -> SampleList:
        """As in the stock class.

        Args:
            batch_inputs: (bs, 3, h, w).
            batch_data_samples: hold ``batch_input_shape``, ``img_shape`` and ``ori_shape``; they get the results.
            rescale: Whether masks and boxes have the size of ``ori_shape``.
        """
        head, fusion = self.panoptic_head, self.panoptic_fusion_head
        own = type(head).predict is not MaskFormerHead.predict or 'predict' in vars(head)
        if own or not isinstance(fusion, MaskFusion) or not fusion.takes_small_masks(batch_inputs):
            return super().predict(batch_inputs, batch_data_samples, rescale)
        classes, masks = head(self.extract_feat(batch_inputs), batch_data_samples)
        size = tuple(batch_data_samples[0].batch_input_shape)
        results = fusion.predict(classes[-1], masks[-1], batch_data_samples, rescale, input_size=size)
        return self.add_pred_to_datasample(batch_data_samples, results)


class MaskFusion(nn.Module):
    """``MaskFormerFusionHead``, whose instances are computed one query at a time on CPUs."""

    def takes_small_masks(self, images: Tensor) -> bool:
        """Whether :meth:`predict` may get masks that are smaller than the images: only for instances, on a CPU."""
        wanted = {name: self.test_cfg.get(f'{name}_on', name == 'panoptic') for name in ('panoptic', 'semantic')}
        return self.test_cfg.get('instance_on', False) and not any(wanted.values()) and images.device.type == 'cpu'

    def predict(
        self,
        mask_cls_results: Tensor,
        mask_pred_results: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = False,
        input_size: Size | None = None,
        **kwargs,
    ) -> list[dict]:
        """As in the stock class; masks are resized one at a time, unless there are panoptic results.

        Args:
            mask_cls_results: (bs, num_queries, num_classes + 1), logits.
            mask_pred_results: (bs, num_queries, h, w), logits.
            batch_data_samples: hold ``img_shape`` and ``ori_shape``.
            rescale: Whether results have the size of ``ori_shape``.
            input_size: Size of the images with their padding. None: that of the masks.
            **kwargs: ignored, as in the stock class.
        """
        if not self.takes_small_masks(mask_pred_results):
            return super().predict(mask_cls_results, mask_pred_results, batch_data_samples, rescale, **kwargs)
        results = []
        for classes, masks, sample in zip(mask_cls_results, mask_pred_results, batch_data_samples, strict=True):
            shape = tuple(sample.img_shape[:2])
            sizes = (input_size or masks.shape[1:], shape, tuple(sample.ori_shape[:2]) if rescale else shape)
            results.append(dict(ins_results=_instances(self, classes, masks, *sizes)))
        return results

    def instance_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> InstanceData:
        """(num_queries, num_classes + 1) and (num_queries, h, w) logits -> instances, as in the stock class."""
        if mask_pred.device.type != 'cpu':
            return super().instance_postprocess(mask_cls, mask_pred)
        return _instances(self, mask_cls, mask_pred, *[mask_pred.shape[1:]] * 3)


def _instances(
    head: nn.Module, mask_cls: Tensor, mask_pred: Tensor, input_size: Size, image_size: Size, size: Size
) -> InstanceData:
    """The instances of an image, with masks enlarged to ``input_size``, cut to ``image_size``, resized to ``size``."""
    scores = F.softmax(mask_cls, dim=-1)[:, :-1]
    scores, indices = scores.flatten().topk(head.test_cfg.get('max_per_image', 100), sorted=False)
    labels = indices % head.num_classes
    things = labels < head.num_things_classes
    # A query occurs once for each of its classes.
    queries, which = (indices // head.num_classes)[things].unique(return_inverse=True)
    masks = mask_pred.new_empty((len(queries), *size), dtype=torch.bool)
    boxes, means = mask_pred.new_zeros((len(queries), 4), dtype=torch.float32), []
    for i, query in enumerate(queries.tolist()):
        logits = _resized(mask_pred[query], input_size)[: image_size[0], : image_size[1]]
        logits = _resized(logits, size)
        inside = torch.gt(logits, 0, out=masks[i]).float()
        means.append((logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        columns, rows = (inside.amax(dim).nonzero().flatten().tolist() for dim in (0, 1))
        if columns:
            boxes[i] = boxes.new_tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    scores = scores[things]
    return InstanceData(
        bboxes=boxes[which],
        labels=labels[things],
        scores=scores * torch.stack(means)[which] if means else scores,
        masks=masks[which],
    )


def _resized(mask: Tensor, size: Size) -> Tensor:
    if mask.shape == size:
        return mask
    return F.interpolate(mask[None, None], size=size, mode='bilinear', align_corners=False)[0, 0]

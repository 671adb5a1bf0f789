"""Augmentations of whole batches, as ``batch_augments`` of a ``DetDataPreprocessor``, that end after some epochs.

Source: Huang et al., DEIM, https://arxiv.org/abs/2412.04234, and the training code of RT-DETR and D-FINE.
"""

from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS


class EpochAugment(nn.Module):
    """An augmentation in the epochs ``begin`` to ``end`` - 1, counted from 0. ``end=None``: until the last epoch."""

    def __init__(self, begin: int = 0, end: int | None = None) -> None:
        super().__init__()
        if begin < 0 or (end is not None and end < begin):
            raise ValueError(f'begin={begin} and end={end} are invalid; expected epochs from 0 on, with begin <= end')
        self.begin = begin
        self.end = end

    def forward(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Augment (B, 3, H, W) images and their samples, if the current epoch is one of this augmentation."""
        epoch = MessageHub.get_current_instance().get_info('epoch', 0)
        if epoch < self.begin or (self.end is not None and epoch >= self.end):
            return inputs, data_samples
        return self.augment(inputs, data_samples)

    def augment(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Augment a batch."""
        raise NotImplementedError


@MODELS.register_module()
class BatchRandomResize(EpochAugment):
    """Resize the images of a batch to a random square size, by nearest neighbor.

    Args:
        sizes: sides in pixels; a size that occurs several times is drawn more often.
        begin, end: first epoch, and the one after the last; from 0.

    Raises:
        ValueError: If there are no sizes, or one is not positive.
    """

    def __init__(self, sizes: Sequence[int], begin: int = 0, end: int | None = None) -> None:
        super().__init__(begin, end)
        if not sizes or min(sizes) < 1:
            raise ValueError(f'sizes={sizes} is invalid; expected positive sides in pixels')
        self.sizes = tuple(sizes)

    def augment(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Resize images, boxes and ``img_shape``."""
        side = self.sizes[torch.randint(len(self.sizes), ())]
        scales = [side / length for length in inputs.shape[-2:]]
        inputs = F.interpolate(inputs, size=(side, side))
        for sample in data_samples:
            boxes = sample.gt_instances.bboxes
            sample.gt_instances.bboxes = boxes * boxes.new_tensor([scales[1], scales[0]] * 2)
            shape = tuple(round(length * scale) for length, scale in zip(sample.img_shape[:2], scales, strict=True))
            sample.set_metainfo(dict(img_shape=shape, pad_shape=(side, side), batch_input_shape=(side, side)))
        return inputs, data_samples


@MODELS.register_module()
class BatchMixUp(EpochAugment):
    """Average each image with the one before it in the batch, and give it the objects of both.

    Args:
        prob: probability for a batch, 0-1.
        ratios: lowest and highest weight of the image, drawn uniformly; the other one has the rest.
        begin, end: first epoch, and the one after the last; from 0.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, prob: float = 0.5, ratios: tuple[float, float] = (0.45, 0.55), begin: int = 0, end: int | None = None
    ) -> None:
        super().__init__(begin, end)
        if not (0 <= prob <= 1 and 0 <= ratios[0] <= ratios[1] <= 1):
            raise ValueError(f'prob={prob} and ratios={ratios} are invalid; expected 0 to 1, the lower ratio first')
        self.prob = prob
        self.ratios = ratios

    def augment(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Mix images and objects. All images of the batch must have one size, without padding."""
        if torch.rand(()) >= self.prob:
            return inputs, data_samples
        ratio = float(torch.empty(()).uniform_(*self.ratios))
        objects = [sample.gt_instances for sample in data_samples]
        for sample, own, other in zip(data_samples, objects, objects[-1:] + objects[:-1], strict=True):
            sample.gt_instances = InstanceData.cat([own, other])
        return inputs * ratio + inputs.roll(1, 0) * (1 - ratio), data_samples

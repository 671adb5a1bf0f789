"""Mixup of the images of a batch.

Source: Huang et al., DEIM, https://arxiv.org/abs/2412.04234.
"""

import random

from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor, nn

from msda_plugin.registry import MODELS


@MODELS.register_module()
class BatchMixUp(nn.Module):
    """Average each image with the one before it in the batch, and give it the objects of both.

    For ``batch_augments`` of a preprocessor. The images of a batch must have one size, without padding.

    Args:
        prob: probability for a batch, 0-1.
        ratios: lowest and highest weight of the image, drawn uniformly; the other one has the rest.
        start_epoch: first epoch with mixup, counted from 0.
        stop_epoch: from this epoch on there is none; None: never.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        prob: float = 0.5,
        ratios: tuple[float, float] = (0.45, 0.55),
        start_epoch: int = 0,
        stop_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if not (0 <= prob <= 1 and 0 <= ratios[0] <= ratios[1] <= 1):
            raise ValueError(f'prob={prob} and ratios={ratios} are invalid; expected 0 to 1, the lower ratio first')
        self.prob = prob
        self.ratios = tuple(ratios)
        self.start_epoch = start_epoch
        self.stop_epoch = stop_epoch

    def forward(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Images (bs, 3, h, w) and their samples -> mixed images, and the samples with more objects."""
        epoch = MessageHub.get_current_instance().get_info('epoch', 0)
        if epoch < self.start_epoch or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return inputs, data_samples
        if random.random() >= self.prob:
            return inputs, data_samples
        ratio = random.uniform(*self.ratios)
        objects = [sample.gt_instances for sample in data_samples]
        for sample, own, other in zip(data_samples, objects, objects[-1:] + objects[:-1], strict=True):
            sample.gt_instances = InstanceData.cat([own, other])
        return inputs * ratio + inputs.roll(1, 0) * (1 - ratio), data_samples

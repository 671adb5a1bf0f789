"""Multi-scale training: a random size for every batch."""

import random
from collections.abc import Sequence

from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS


@MODELS.register_module()
class BatchRandomResize(nn.Module):
    """Resize a training batch to a square of a random size, as RT-DETR does, for ``batch_augments`` of a preprocessor.

    Args:
        sizes: sides in pixels, one of which is chosen for each batch with equal probability; repeat a side to choose it
            more often.
        stop_epoch: from this epoch on (counted from 0), batches keep their size; None: never.

    Raises:
        ValueError: If there are no sizes.
    """

    def __init__(self, sizes: Sequence[int], stop_epoch: int | None = None) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f'sizes is {sizes}; expected at least one side in pixels')
        self.sizes = tuple(sizes)
        self.stop_epoch = stop_epoch

    def forward(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Images (bs, 3, h, w) and their samples -> images (bs, 3, size, size) and the samples, scaled in place."""
        epoch = MessageHub.get_current_instance().get_info('epoch', 0)
        if self.stop_epoch is not None and epoch >= self.stop_epoch:
            return inputs, data_samples
        size = random.choice(self.sizes)
        height, width = inputs.shape[-2:]
        if (height, width) == (size, size):
            return inputs, data_samples
        scale_x, scale_y = size / width, size / height
        for sample in data_samples:
            shapes = {
                name: (round(sample.get(name)[0] * scale_y), round(sample.get(name)[1] * scale_x))
                for name in ('img_shape', 'pad_shape')
                if name in sample
            }
            sample.set_metainfo(shapes | dict(batch_input_shape=(size, size)))
            for name in ('gt_instances', 'ignored_instances'):
                if name in sample:
                    boxes = sample.get(name).bboxes
                    # Box structures of MMDetection have their own method.
                    if isinstance(boxes, Tensor):
                        sample.get(name).bboxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
                    else:
                        boxes.rescale_((scale_x, scale_y))
        return F.interpolate(inputs, size=(size, size)), data_samples

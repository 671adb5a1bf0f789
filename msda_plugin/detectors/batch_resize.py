"""Multi-scale training: a random scale for every batch."""

import random
from collections.abc import Sequence

from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS


@MODELS.register_module()
class BatchRandomResize(nn.Module):
    """Scale a training batch by a random factor, as RT-DETR does, for ``batch_augments`` of a data preprocessor.

    Args:
        sizes: sides in pixels, one of which is chosen for each batch with equal probability; repeat a side to choose it
            more often. The factor is the side divided by ``base_size``.
        base_size: side of the images that ``sizes`` are meant for. Images of another size are scaled by the same
            factor.
        divisor: height and width are rounded to multiples of it.
        stop_epoch: from this epoch on (counted from 0), batches keep their size; None: never.

    Raises:
        ValueError: If a size is missing or below 1.
    """

    def __init__(
        self, sizes: Sequence[int], base_size: int = 640, divisor: int = 32, stop_epoch: int | None = None
    ) -> None:
        super().__init__()
        if not sizes or min(*sizes, base_size, divisor) < 1:
            raise ValueError(
                f'sizes={sizes}, base_size={base_size} and divisor={divisor}; expected at least one size, and at least '
                '1 pixel for each of them'
            )
        self.sizes = tuple(sizes)
        self.base_size = base_size
        self.divisor = divisor
        self.stop_epoch = stop_epoch

    def forward(self, inputs: Tensor, data_samples: list[DetDataSample]) -> tuple[Tensor, list[DetDataSample]]:
        """Images (bs, 3, h, w) and their samples -> the images of another size, and the samples, changed in place."""
        epoch = MessageHub.get_current_instance().get_info('epoch', 0)
        if self.stop_epoch is not None and epoch >= self.stop_epoch:
            return inputs, data_samples
        factor = random.choice(self.sizes) / self.base_size
        old = tuple(inputs.shape[-2:])
        new = tuple(max(round(side * factor / self.divisor), 1) * self.divisor for side in old)
        if new == old:
            return inputs, data_samples
        scale_y, scale_x = new[0] / old[0], new[1] / old[1]
        for sample in data_samples:
            shapes = {
                name: (round(sample.get(name)[0] * scale_y), round(sample.get(name)[1] * scale_x))
                for name in ('img_shape', 'pad_shape')
                if name in sample
            }
            sample.set_metainfo(shapes | dict(batch_input_shape=new))
            for name in ('gt_instances', 'ignored_instances'):
                if name in sample:
                    boxes = sample.get(name).bboxes
                    # Box structures of MMDetection have their own method.
                    if isinstance(boxes, Tensor):
                        sample.get(name).bboxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
                    else:
                        boxes.rescale_((scale_x, scale_y))
        return F.interpolate(inputs, size=new), data_samples

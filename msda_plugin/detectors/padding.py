"""Which pixels of a batch of images of several sizes are padding."""

from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from torch import Tensor
from torch.nn import functional as F


def is_padded(batch_data_samples: list[DetDataSample] | None) -> bool:
    """Whether an image is smaller than the batch; without samples there is no padding, nor in an export to ONNX."""
    if batch_data_samples is None or torch.onnx.is_in_onnx_export():
        return False
    return any(
        tuple(sample.img_shape[:2]) != tuple(batch_data_samples[0].batch_input_shape) for sample in batch_data_samples
    )


def padding_masks(
    shapes: Sequence[tuple[int, int]], batch_data_samples: list[DetDataSample], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Masks and valid shares of maps of the batch.

    Args:
        shapes: (h, w) of each map.
        batch_data_samples: give ``batch_input_shape`` and each ``img_shape``, (h, w) in pixels.

    Returns:
        For each map a mask (bs, h, w), True on padding; and (bs, num_maps, 2), the shares of its width and height that
        are not.
    """
    extents = torch.tensor([sample.img_shape[:2] for sample in batch_data_samples]).to(device, non_blocking=True)
    # Images fill the top left corner, so that rows and columns can be resized apart, by nearest neighbour.
    beyond = [
        (torch.arange(size, device=device) >= extent[:, None]).float()[None]
        for size, extent in zip(batch_data_samples[0].batch_input_shape, extents.unbind(1), strict=True)
    ]
    masks, ratios = [], []
    for shape in shapes:
        rows, columns = (F.interpolate(mask, size=size)[0].bool() for mask, size in zip(beyond, shape, strict=True))
        masks.append(rows[:, :, None] | columns[:, None, :])
        ratios.append(torch.stack([1 - columns.float().mean(1), 1 - rows.float().mean(1)], -1))
    return masks, torch.stack(ratios, 1)

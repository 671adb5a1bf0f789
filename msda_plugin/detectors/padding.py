"""Padding masks of a batch of images of different sizes."""

from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from torch import Tensor
from torch.nn import functional as F

from msda_plugin.layers.reference_points import sizes_tensor


def is_padded(batch_data_samples: list[DetDataSample] | None) -> bool:
    """Whether an image is smaller than the batch. False without samples."""
    if batch_data_samples is None:
        return False
    padded_size = batch_data_samples[0].batch_input_shape
    return any(
        _may_differ(side, padded_side)
        for sample in batch_data_samples
        for side, padded_side in zip(sample.img_shape[:2], padded_size, strict=True)
    )


def _may_differ(side: int, padded_side: int) -> bool:
    if isinstance(side, torch.SymInt) or isinstance(padded_side, torch.SymInt):
        # A comparison would restrict an exported graph to images that need padding.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return not statically_known_true(side == padded_side)
    return bool(side != padded_side)


def padding_masks(
    shapes: Sequence[tuple[int, int]], batch: int, batch_data_samples: list[DetDataSample], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Padding masks and valid ratios of the maps of a batch.

    Args:
        shapes: (h, w) of each map.
        batch: number of images.
        batch_data_samples: hold ``batch_input_shape`` and ``img_shape`` of each image, (h, w) in pixels; a single one
            stands for all images.

    Returns:
        A mask (bs, h, w) for each map, True on padding; and valid ratios (bs, num_maps, 2), the fractions of width and
        height that are not padding.
    """
    extents = sizes_tensor([sample.img_shape[:2] for sample in batch_data_samples], device).expand(batch, 2)
    # Images fill the top left corner, so rows and columns can be resized separately, by nearest neighbor.
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

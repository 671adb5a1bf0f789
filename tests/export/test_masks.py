"""Masks of exported graphs are those of MMDetection."""

import numpy as np
import torch
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.structures.mask import mask2bbox

from msda_plugin.export.masks import bounding_boxes, paste


def test_bounding_boxes():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 4, 9, 13, generator=generator) > 0.95
    masks[1, 2] = False
    masks[0, 0] = True
    boxes = bounding_boxes(masks)
    torch.testing.assert_close(boxes.flatten(0, 1), mask2bbox(masks.flatten(0, 1)))
    assert boxes[0, 0].tolist() == [0, 0, 13, 9] and not boxes[1, 2].any()


def test_paste():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 14, 28, generator=generator)
    corners = torch.rand(5, 2, 2, generator=generator) * torch.tensor([50.0, 40.0])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], -1)
    expected, _ = _do_paste_mask(masks[:, None], boxes, 40, 50, skip_empty=False)
    pasted = paste(masks, boxes, 40, 50)
    assert pasted.max() > 0.5
    np.testing.assert_allclose(pasted.numpy(), expected.numpy(), atol=1e-4)

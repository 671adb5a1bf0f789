"""Decides whether torchvision's operators run in place of the PyTorch ones."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def torchvision_for(tensor: Tensor) -> ModuleType | None:
    """Return ``torchvision.ops`` if it runs for this tensor, else None.

    Only float32 and float64: torchvision rounds coordinates in lower precision.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        return None
    return find(tensor.device.type)[0]


@cache
def find(device_type: str) -> tuple[ModuleType | None, str]:
    """Import ``torchvision.ops`` and compare it with known results on a device, once per process.

    A torchvision built for another torch imports, but its operators fail when called; on a GPU, a CPU-only build does.

    Returns:
        ``torchvision.ops`` and an empty string, or None and the reason.
    """
    try:
        from torchvision import ops
    except ImportError:
        return None, 'torchvision is not installed'
    except Exception as error:  # a torchvision built for another torch fails in many ways
        return None, f'torchvision cannot be imported: {error}'
    try:
        wrong = _disagreement(ops, device_type)
    except Exception as error:
        return None, f'torchvision does not run on {device_type}: {" ".join(str(error).split())[:200]}'
    return (None, f'{wrong} of torchvision differs from mmcv') if wrong else (ops, '')


def _disagreement(ops: ModuleType, device_type: str) -> str:
    """Name the torchvision operator whose result differs from mmcv's; empty if there is none."""
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3], [5, 5, 6, 6]], device=device_type)
    if ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1], device=device_type), 0.5).tolist() != [1, 2]:
        return 'nms'
    image = torch.arange(16.0, device=device_type).reshape(1, 1, 4, 4)
    roi = torch.tensor([[0.0, 0, 0, 4, 4]], device=device_type)
    pooled = ops.roi_align(image, roi, (2, 2), 1.0, 0, True)
    if not torch.allclose(pooled.flatten().cpu(), torch.tensor([2.5, 4.5, 10.5, 12.5])):
        return 'roi_align'
    weight, offset, mask = image[:, :, :2, :2], image.new_zeros(1, 8, 3, 3), image.new_ones(1, 4, 3, 3)
    offset[:, 1::2] = 1.0  # one pixel to the right
    moved = torch.nn.functional.pad(image, (0, 1))[..., 1:]
    columns = torch.nn.functional.unfold(moved, 2)
    if not torch.allclose(
        ops.deform_conv2d(image, offset, weight, mask=mask).flatten(), (weight.flatten() @ columns[0]).flatten()
    ):
        return 'deform_conv2d'
    return ''

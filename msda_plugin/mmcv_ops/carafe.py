"""Content-aware upsampling: ``carafe_forward`` and ``carafe_backward`` of mmcv, which has them on GPUs only.

Source: Wang et al., CARAFE, https://arxiv.org/abs/1905.02188. Each output pixel is a weighted sum of the kernel_size x
kernel_size neighborhood of its input pixel.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the upsampled features into `output`; `routput` and `rmasks` are not needed.

    Args:
        features: (bs, num_channels, height, width).
        masks: (bs, group_size * kernel_size², height * scale_factor, width * scale_factor), the weights.
        rfeatures: As `features`, receives them for :func:`carafe_backward`.
        output: (bs, num_channels, height * scale_factor, width * scale_factor).
    """
    rfeatures.copy_(features)
    total = _accumulated(output)
    for _, shifted, weights in _neighbors(_accumulated(features), masks, kernel_size, group_size, scale_factor):
        total += (shifted * weights).view_as(total)
    output.copy_(total)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of features and masks into `bottom_grad` and `mask_grad`."""
    bs, channels, height, width = rfeatures.shape
    radius = kernel_size // 2
    grad = _accumulated(top_grad).view(bs, group_size, -1, height, scale_factor, width, scale_factor)
    mask_grads = mask_grad.view(bs, group_size, -1, height, scale_factor, width, scale_factor)
    total = grad.new_zeros(bs, channels, height + 2 * radius, width + 2 * radius)
    for index, shifted, weights in _neighbors(_accumulated(rfeatures), masks, kernel_size, group_size, scale_factor):
        row, column = divmod(index, kernel_size)
        grad_shifted = (grad * weights).sum((4, 6)).view(bs, channels, height, width)
        total[:, :, row : row + height, column : column + width] += grad_shifted
        mask_grads[:, :, index] = (grad * shifted).sum(2)
    bottom_grad.copy_(total[:, :, radius : radius + height, radius : radius + width])


def _accumulated(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _neighbors(
    features: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each place of the kernel with the features there and their weights.

    Both broadcast to (bs, groups, num_channels / groups, height, scale, width, scale).
    """
    bs, _, height, width = features.shape
    radius = kernel_size // 2
    padded = F.pad(features, (radius,) * 4)
    masks = masks.to(features.dtype).view(bs, groups, -1, height, scale, width, scale)
    for index in range(kernel_size * kernel_size):
        row, column = divmod(index, kernel_size)
        shifted = padded[:, :, row : row + height, column : column + width]
        shifted = shifted.reshape(bs, groups, -1, height, 1, width, 1)
        yield index, shifted, masks[:, :, index, None]

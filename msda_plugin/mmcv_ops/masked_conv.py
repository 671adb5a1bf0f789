"""Convolution at chosen pixels: ``masked_im2col_forward`` and ``masked_col2im_forward`` of mmcv (GPU only there)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write the neighborhood of each chosen pixel into a column of `col`.

    Args:
        im: (1, num_channels, height, width).
        mask_h_idx, mask_w_idx: (n,) int64, the chosen pixels.
        col: (num_channels * kernel_h * kernel_w, n).
    """
    padded = F.pad(im[0], (pad_w, max(pad_w, kernel_w), pad_h, max(pad_h, kernel_h)))
    rows = mask_h_idx[:, None] + torch.arange(kernel_h, device=im.device)
    columns = mask_w_idx[:, None] + torch.arange(kernel_w, device=im.device)
    col.copy_(padded[:, rows[:, :, None], columns[:, None]].permute(0, 2, 3, 1).reshape(col.shape))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write each column of `col`, (channels, n), to its pixel in `im`, (1, channels, height, width)."""
    im[0, :, mask_h_idx, mask_w_idx] = col

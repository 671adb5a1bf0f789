"""Deformable convolution, plain and modulated: ``deform_conv_*`` and ``modulated_deform_conv_*`` of mmcv.

Sources: Dai et al., Deformable Convolutional Networks, https://arxiv.org/abs/1703.06211; Zhu et al., Deformable
ConvNets v2, https://arxiv.org/abs/1811.11168.

For each image, the samples become the columns of a matrix, which is multiplied by the weight. A sample is a weighted
sum of four pixels, the same for all channels of a deformable group, so :func:`torch.nn.functional.embedding_bag`
computes it, and its autograd gives the gradients of pixels and weights. float16 and bfloat16 are sampled in float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_plugin.mmcv_ops.torchvision_ops import torchvision_for


class _Geometry(NamedTuple):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    deform_groups: int


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the convolution into `output`; `columns`, `ones` and `im2col_step` are not needed.

    Args:
        input: (bs, in_channels, height, width).
        weight: (out_channels, in_channels / group, kH, kW).
        offset: (bs, deformable_group * kH * kW * 2, out_height, out_width), (y, x) of each kernel element, in pixels.
        output: (bs, out_channels, out_height, out_width).
    """
    geometry = _Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _forward(input, weight, None, offset, None, output, geometry)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the gradient of the input to `gradInput` and write that of the offsets into `gradOffset`."""
    geometry = _Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _backward(input, weight, offset, None, gradOutput, geometry, gradInput, None, gradOffset, None)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add the gradient of the weight, times `scale`, to `gradWeight`."""
    geometry = _Geometry((kH, kW), (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _backward(input, gradWeight, offset, None, gradOutput * scale, geometry, None, gradWeight, None, None)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """:func:`deform_conv_forward` with a factor for each sample and a bias.

    mmcv's kernels read offsets and mask as flat memory, without a look at their shapes, and models such as DyHead pass
    those of a larger feature: as in mmcv, the first elements of each image are used.

    Args:
        bias: (out_channels,); read if `with_bias`.
        mask: (bs, deformable_group * kernel_h * kernel_w, out_height, out_width).
    """
    geometry = _Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    offset, mask = (_first_elements(t, channels, output) for t, channels in _sampling(offset, mask, geometry))
    _forward(input, weight, bias if with_bias else None, offset, mask, output, geometry)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the gradients of input, weight and bias to theirs, and write those of offsets and mask into theirs."""
    geometry = _Geometry(
        (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group
    )
    offset, mask = (_first_elements(t, channels, grad_output) for t, channels in _sampling(offset, mask, geometry))
    grads = torch.zeros_like(offset), torch.zeros_like(mask)
    _backward(input, weight, offset, mask, grad_output, geometry, grad_input, grad_weight, *grads)
    for total, grad in zip((grad_offset, grad_mask), grads, strict=True):
        flat = grad.flatten(1)
        total.copy_(F.pad(flat, (0, math.prod(total.shape[1:]) - flat.shape[1])).view_as(total))
    if with_bias:
        grad_bias.add_(grad_output.sum((0, 2, 3)))


def _sampling(
    offset: Tensor, mask: Tensor | None, geometry: _Geometry
) -> tuple[tuple[Tensor, int], tuple[Tensor | None, int]]:
    """Offsets and mask, each with the number of channels that it needs."""
    samples = geometry.deform_groups * geometry.kernel[0] * geometry.kernel[1]
    return (offset, 2 * samples), (mask, samples)


def _first_elements(tensor: Tensor, channels: int, output: Tensor) -> Tensor:
    """The first elements of each image in the shape that the output needs; the tensor itself if it has that shape."""
    shape = (len(tensor), channels, *output.shape[2:])
    needed = math.prod(shape[1:])
    if tensor.shape == shape or math.prod(tensor.shape[1:]) < needed:
        return tensor
    return tensor.flatten(1)[:, :needed].view(shape)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor | None,
    output: Tensor,
    geometry: _Geometry,
) -> None:
    _check(input, weight, offset, mask, output, geometry)
    if (torchvision := torchvision_for(input)) is not None:
        output.copy_(_torchvision(torchvision, input, offset, weight, bias, mask, geometry))
        return
    grouped_weight = weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)
    with torch.autocast(input.device.type, enabled=False):
        for index in range(len(input)):
            columns = _columns(input[index], offset[index], None if mask is None else mask[index], geometry)
            output[index] = (grouped_weight @ columns).view_as(output[index])
    if bias is not None:
        output += bias[:, None, None]


def _backward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    grad_output: Tensor,
    geometry: _Geometry,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
) -> None:
    """Compute the gradients whose tensors are given."""
    _check(input, weight, offset, mask, grad_output, geometry)
    if (torchvision := torchvision_for(input)) is not None:
        targets = [(input, grad_input), (weight, grad_weight), (offset, grad_offset), (mask, grad_mask)]
        with torch.enable_grad():
            leaves = [t if t is None else t.detach().requires_grad_(grad is not None) for t, grad in targets]
            output = _torchvision(torchvision, leaves[0], leaves[2], leaves[1], None, leaves[3], geometry)
            grads = torch.autograd.grad(output, [t for t in leaves if t is not None and t.requires_grad], grad_output)
        for total, grad in zip([grad for _, grad in targets if grad is not None], grads, strict=True):
            total.copy_(grad) if total is grad_offset or total is grad_mask else total.add_(grad)
        return
    groups = geometry.groups
    grouped_weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    with torch.autocast(input.device.type, enabled=False):
        for index in range(len(input)):
            needed = [(input, grad_input), (offset, grad_offset), (mask, grad_mask)]
            with torch.enable_grad():
                leaves = [t if t is None else t[index].detach().requires_grad_(grad is not None) for t, grad in needed]
                columns = _columns(*leaves, geometry)
            grads_out = grad_output[index].reshape(groups, grouped_weight.shape[1], -1)
            if grad_weight is not None:
                grad_weight += (grads_out @ columns.detach().mT).view_as(grad_weight)
            if grad_input is not None:
                grad_columns = grouped_weight.mT @ grads_out
                grads = torch.autograd.grad(columns, [t for t in leaves if t is not None], grad_columns)
                grad_input[index] += grads[0]
                grad_offset[index] = grads[1]
                if grad_mask is not None:
                    grad_mask[index] = grads[2]


def _columns(image: Tensor, offset: Tensor, mask: Tensor | None, geometry: _Geometry) -> Tensor:
    """Sample one image for each kernel element and output pixel.

    Args:
        image: (in_channels, height, width).
        offset: (deform_groups * kernel size * 2, out_height, out_width).
        mask: (deform_groups * kernel size, out_height, out_width) or None.

    Returns:
        (groups, in_channels / groups * kernel size, out_height * out_width), in the dtype of the image.
    """
    channels, height, width = image.shape
    out_height, out_width = offset.shape[1:]
    deform_groups, kernel_size = geometry.deform_groups, geometry.kernel[0] * geometry.kernel[1]
    accumulation = torch.float64 if image.dtype == torch.float64 else torch.float32
    y, x, inside = _coordinates(offset.to(accumulation), geometry, height, width)
    if mask is not None:
        inside = inside * mask.to(accumulation).reshape(inside.shape)
    rows, row_weights = _neighbors(y, height)
    columns, column_weights = _neighbors(x, width)
    group = torch.arange(deform_groups, device=image.device).view(-1, 1, 1, 1, 1, 1)
    pixels = (group * height + rows[..., :, None]) * width + columns[..., None, :]
    weights = row_weights[..., :, None] * column_weights[..., None, :] * inside[..., None, None]
    table = image.to(accumulation).reshape(deform_groups, -1, height * width).transpose(1, 2)
    samples = F.embedding_bag(
        pixels.view(-1, 4), table.reshape(-1, table.shape[2]), mode='sum', per_sample_weights=weights.view(-1, 4)
    )
    samples = samples.view(deform_groups, kernel_size, out_height * out_width, -1).permute(0, 3, 1, 2)
    return samples.reshape(geometry.groups, channels // geometry.groups * kernel_size, -1).to(image.dtype)


def _coordinates(offset: Tensor, geometry: _Geometry, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of the samples, in pixels, and whether they lie on the image.

    Args:
        offset: (..., deform_groups * kernel size * 2, out_height, out_width).

    Returns:
        y, x and a bool, each (..., deform_groups, kernel size, out_height, out_width).
    """
    kernel_y, kernel_x = (
        torch.arange(size, device=offset.device) * dilation
        for size, dilation in zip(geometry.kernel, geometry.dilation, strict=True)
    )
    out_y, out_x = (
        torch.arange(size, device=offset.device) * stride - padding
        for size, stride, padding in zip(offset.shape[-2:], geometry.stride, geometry.padding, strict=True)
    )
    kernel_y, kernel_x = kernel_y.repeat_interleave(len(kernel_x)), kernel_x.repeat(len(kernel_y))
    offset = offset.unflatten(-3, (geometry.deform_groups, -1, 2))
    y = (kernel_y[:, None, None] + out_y[:, None]) + offset[..., 0, :, :]
    x = (kernel_x[:, None, None] + out_x) + offset[..., 1, :, :]
    return y, x, (y > -1) & (y < height) & (x > -1) & (x < width)


def _neighbors(coordinate: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(..., 2) pixels before and after a coordinate along one axis, and their weights; beyond the image they are 0."""
    coordinate = torch.where((coordinate > -1) & (coordinate < length), coordinate, -1)
    low = coordinate.detach().floor()
    fraction = coordinate - low
    pixels = torch.stack((low, low + 1), -1).long()
    weights = torch.stack((1 - fraction, fraction), -1) * ((pixels >= 0) & (pixels < length))
    return pixels.clamp(0, length - 1), weights


def _check(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, output: Tensor, geometry: _Geometry
) -> None:
    for name, (tensor, channels) in zip(('offset', 'mask'), _sampling(offset, mask, geometry), strict=True):
        expected = (len(input), channels, *output.shape[2:])
        if tensor is not None and tuple(tensor.shape) != expected:
            raise RuntimeError(f'{name} has shape {tuple(tensor.shape)}, but {expected} is needed')
    if input.shape[1] != weight.shape[1] * geometry.groups:
        raise RuntimeError(
            f'input has {input.shape[1]} channels, but the weight needs {weight.shape[1] * geometry.groups}'
        )


def _torchvision(
    ops, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: _Geometry
) -> Tensor:
    # Off the image, mmcv's samples are 0 without a gradient. torchvision has a gradient at a coordinate of exactly -1,
    # as in the padding before the first step of training, and crashes at NaN: such samples are moved far away.
    inside = _coordinates(offset, geometry, *input.shape[2:])[2].unsqueeze(3)
    offset = torch.where(inside, offset.unflatten(1, (geometry.deform_groups, -1, 2)), -1e6).flatten(1, 3)
    return ops.deform_conv2d(input, offset, weight, bias, geometry.stride, geometry.padding, geometry.dilation, mask)

"""RoIAlign and RoIPool: ``roi_align_*`` and ``roi_pool_*`` of mmcv.

Sources: He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870; Girshick, Fast R-CNN, https://arxiv.org/abs/1504.08083.

A bin of RoIAlign is a weighted sum of pixels, the same for all channels, so :func:`torch.nn.functional.embedding_bag`
computes it from the pixels as rows of a table; no tensor holds the samples of all channels. RoIs are taken in chunks
that bound the memory. float16 and bfloat16 are computed in float32.
"""

from collections.abc import Iterator
from ctypes import c_float
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_plugin.mmcv_ops.torchvision_ops import torchvision_for

MAX_SAMPLES = 2**18  # in a chunk; each is four indices and weights
MAX_VALUES = 2**22  # in a chunk whose pixels or samples are read for all channels
MAX_START = -10000.0  # where mmcv's maximum starts: the result of a bin without a sample
FLT_MAX = torch.finfo(torch.float32).max


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool bilinear samples within each bin of each RoI into `output`.

    Args:
        input: (bs, num_channels, height, width).
        rois: (n, 5), image index and xyxy in pixels of the image.
        output: (n, num_channels, aligned_height, aligned_width).
        argmax_y, argmax_x: As `output`, receive the coordinates of the highest sample if `pool_mode` is 0.
        spatial_scale: Size of the input divided by size of the image.
        sampling_ratio: Samples along each side of a bin; 0 takes one per pixel, rounded up.
        pool_mode: 0 is the maximum, 1 the average.
        aligned: Shift by half a pixel, so that a coordinate is the center of its pixel.

    Raises:
        RuntimeError: If an RoI has a negative size, with `aligned`, on the CPU.
    """
    size = (aligned_height, aligned_width)
    if aligned and rois.device.type == 'cpu' and bool((rois[:, 3:] < rois[:, 1:3]).any()):
        raise RuntimeError('RoIAlign with aligned=True needs RoIs with x2 >= x1 and y2 >= y1')
    if (torchvision := _torchvision_for(input, pool_mode)) is not None:
        output.copy_(torchvision.roi_align(input, rois.to(input), size, spatial_scale, sampling_ratio, aligned))
        return
    table = _table(input)
    for chunk, samples in _chunks(rois, input, size, spatial_scale, sampling_ratio, aligned, pool_mode):
        if pool_mode == 1:
            bins = _average(table, samples)
        else:
            bins, highest_y, highest_x = _maximum(table, samples)
            argmax_y[chunk] = _unfold(highest_y, size).to(argmax_y.dtype)
            argmax_x[chunk] = _unfold(highest_x, size).to(argmax_x.dtype)
        output[chunk] = _unfold(bins, size).to(output.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `input` to `grad_input`; the arguments are those of :func:`roi_align_forward`."""
    size = (aligned_height, aligned_width)
    if (torchvision := _torchvision_for(grad_input, pool_mode)) is not None:
        with torch.enable_grad():
            zeros = torch.zeros_like(grad_input).requires_grad_()
            pooled = torchvision.roi_align(zeros, rois.to(zeros), size, spatial_scale, sampling_ratio, aligned)
            grad_input.add_(torch.autograd.grad(pooled, zeros, grad_output)[0])
        return
    grad_table = torch.zeros_like(_table(grad_input))
    if pool_mode == 1:
        for chunk, samples in _chunks(rois, grad_input, size, spatial_scale, sampling_ratio, aligned, pool_mode):
            with torch.enable_grad():
                zeros = torch.zeros_like(grad_table).requires_grad_()
                bins = _average(zeros, samples)
                grad_table += torch.autograd.grad(bins, zeros, _fold(grad_output[chunk]).to(zeros.dtype))[0]
    else:
        # Each bin and channel has its own sample, so each element of the table is a row.
        channels = grad_input.shape[1]
        y, x = (_fold(t).flatten().to(grad_table.dtype) for t in (argmax_y, argmax_x))
        images = rois[:, 0].long().repeat_interleave(channels * aligned_height * aligned_width)
        pixels, weights = _corners(y, x, images, *grad_input.shape[2:])
        weights = weights * (y != -1)[:, None] * _fold(grad_output).flatten()[:, None].to(weights.dtype)
        channel = torch.arange(channels, device=y.device).repeat(len(y) // max(1, channels))
        grad_table.view(-1).index_add_(0, (pixels * channels + channel[:, None]).flatten(), weights.flatten())
    bs, channels, height, width = grad_input.shape
    grad_input.add_(grad_table.view(bs, height, width, channels).permute(0, 3, 1, 2))


def _torchvision_for(input: Tensor, pool_mode: int) -> ModuleType | None:
    """In float64 torchvision rounds numbers of samples up in float64, and mmcv in float32: they differ at integers."""
    return torchvision_for(input) if pool_mode == 1 and input.dtype == torch.float32 else None


class _Samples(NamedTuple):
    """The samples of some RoIs, bin after bin."""

    pixels: Tensor  # (num_samples, 4), rows of the table
    weights: Tensor  # (num_samples, 4)
    bins: Tensor  # (num_samples,), ascending
    first: Tensor  # (num_bins,), first sample of each bin
    counts: Tensor  # (num_bins,)
    y: Tensor  # (num_samples,)
    x: Tensor


def _table(input: Tensor) -> Tensor:
    """(bs * height * width, num_channels) rows of the pixels, at least in float32."""
    rows = input.permute(0, 2, 3, 1).reshape(-1, input.shape[1])
    return (rows if rows.dtype in (torch.float32, torch.float64) else rows.float()).contiguous()


def _fold(output: Tensor) -> Tensor:
    """(n, num_channels, h, w) to (n * h * w, num_channels)."""
    return output.permute(0, 2, 3, 1).reshape(-1, output.shape[1])


def _unfold(bins: Tensor, size: tuple[int, int]) -> Tensor:
    """(n * h * w, num_channels) to (n, num_channels, h, w)."""
    return bins.view(-1, *size, bins.shape[1]).permute(0, 3, 1, 2)


def _chunks(
    rois: Tensor,
    input: Tensor,
    size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    pool_mode: int,
) -> Iterator[tuple[slice, _Samples]]:
    """Yield the samples of consecutive RoIs, as many as the memory bound allows."""
    accumulation = torch.float64 if input.dtype == torch.float64 else torch.float32
    rois = rois.to(accumulation)
    corners = rois[:, 1:] * c_float(spatial_scale).value - (0.5 if aligned else 0.0)  # mmcv passes the scale as float
    starts, sizes = corners[:, [1, 0]], corners[:, [3, 2]] - corners[:, [1, 0]]  # (n, 2), y and x
    if not aligned:
        sizes = sizes.clamp(min=1)
    bin_sizes = sizes / sizes.new_tensor(size)
    if sampling_ratio > 0:
        grids = torch.full_like(sizes, sampling_ratio, dtype=torch.long)
    else:
        grids = bin_sizes.float().ceil().long().clamp(min=0)
    # The maximum needs the samples of all channels at once.
    limit = MAX_SAMPLES if pool_mode == 1 else MAX_VALUES // max(1, input.shape[1])
    begin = total = 0
    for index, count in enumerate((grids.prod(1) * size[0] * size[1]).tolist()):
        if index > begin and total + count > limit:
            chunk = slice(begin, index)
            yield chunk, _samples(rois[chunk, 0], starts[chunk], bin_sizes[chunk], grids[chunk], size, input)
            begin, total = index, 0
        total += count
    if len(rois):
        chunk = slice(begin, len(rois))
        yield chunk, _samples(rois[chunk, 0], starts[chunk], bin_sizes[chunk], grids[chunk], size, input)


def _samples(
    images: Tensor, starts: Tensor, bin_sizes: Tensor, grids: Tensor, size: tuple[int, int], input: Tensor
) -> _Samples:
    bins_per_roi = size[0] * size[1]
    counts = grids.prod(1).repeat_interleave(bins_per_roi)
    first = counts.cumsum(0) - counts
    bins = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    in_bin = torch.arange(len(bins), device=counts.device) - first[bins]
    roi, bin_in_roi = bins // bins_per_roi, bins % bins_per_roi
    columns = grids[roi, 1]
    y, x = (
        starts[roi, axis]
        + bin_index * bin_sizes[roi, axis]
        + (sample + 0.5) * bin_sizes[roi, axis] / grids[roi, axis].to(starts.dtype)
        for axis, bin_index, sample in (
            (0, bin_in_roi // size[1], in_bin // columns),
            (1, bin_in_roi % size[1], in_bin % columns),
        )
    )
    pixels, weights = _corners(y, x, images.long()[roi], *input.shape[2:])
    return _Samples(pixels, weights, bins, first, counts, y, x)


def _corners(y: Tensor, x: Tensor, images: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around each sample as rows of the table, and their weights; 0 for samples off the image."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    rows, row_weights = _neighbors(torch.where(inside, y, 0), height)
    columns, column_weights = _neighbors(torch.where(inside, x, 0), width)
    pixels = (images * height * width)[:, None, None] + rows[:, :, None] * width + columns[:, None]
    weights = row_weights[:, :, None] * column_weights[:, None] * inside[:, None, None]
    return pixels.flatten(1), weights.flatten(1)


def _neighbors(coordinate: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(n, 2) pixels before and after a coordinate along one axis, and their weights; at the border, one pixel."""
    coordinate = coordinate.clamp(0, length - 1)
    low = coordinate.long()
    fraction = coordinate - low
    return torch.stack((low, (low + 1).clamp(max=length - 1)), 1), torch.stack((1 - fraction, fraction), 1)


def _average(table: Tensor, samples: _Samples) -> Tensor:
    """(num_bins, num_channels) averages; 0 for bins without a sample."""
    sums = F.embedding_bag(
        samples.pixels.flatten(), table, samples.first * 4, mode='sum', per_sample_weights=samples.weights.flatten()
    )
    return sums / samples.counts.clamp(min=1)[:, None].to(sums.dtype)


def _maximum(table: Tensor, samples: _Samples) -> tuple[Tensor, Tensor, Tensor]:
    """(num_bins, num_channels) maxima and the coordinates of their samples; -1 for bins without a sample."""
    num_bins, num_channels = len(samples.counts), table.shape[1]
    longest = int(samples.counts.max()) if len(samples.bins) else 1
    padded = table.new_full((num_bins, longest, num_channels), -torch.inf)
    coordinates = table.new_full((2, num_bins, longest), -1)
    in_bin = torch.arange(len(samples.bins), device=table.device) - samples.first[samples.bins]
    padded[samples.bins, in_bin] = F.embedding_bag(
        samples.pixels, table, mode='sum', per_sample_weights=samples.weights
    )
    coordinates[:, samples.bins, in_bin] = torch.stack((samples.y, samples.x))
    highest, index = padded.max(1)
    found = highest > MAX_START
    y, x = (torch.where(found, axis.gather(1, index), -1) for axis in coordinates)
    return highest.clamp(min=MAX_START), y, x


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the maximum of the pixels in each bin of each RoI into `output`; mmcv itself has this on GPUs only.

    Args:
        input: (bs, num_channels, height, width).
        rois: (n, 5), image index and xyxy in pixels of the image, x2 and y2 included. RoIs without area leave `output`
            and `argmax` as they are.
        output: (n, num_channels, pooled_height, pooled_width); 0 for bins off the image.
        argmax: int32, as `output`; receives the pixel, y * width + x, and -1 for bins off the image.
    """
    height, width = input.shape[2:]
    size = (pooled_height, pooled_width)
    table = _table(input)
    boxes = rois.to(table.dtype)
    scale = c_float(spatial_scale).value
    starts = boxes[:, [2, 1]] * scale  # (n, 2), y and x
    sizes = (boxes[:, [4, 3]] + 1) * scale - starts
    has_area = (sizes > 0).all(1)
    bin_sizes = sizes / sizes.new_tensor(size)
    lows, highs = [], []
    for axis, length in enumerate((height, width)):
        steps = torch.arange(size[axis] + 1, device=boxes.device, dtype=boxes.dtype)
        edges = steps * bin_sizes[:, axis, None] + starts[:, axis, None]
        lows.append(edges[:, :-1].floor().clamp(0, length).long())
        highs.append(edges[:, 1:].ceil().clamp(0, length).long())
    extents = [max(1, int((high - low).max())) if len(rois) else 1 for low, high in zip(lows, highs, strict=True)]
    step = max(1, MAX_VALUES // (size[0] * size[1] * extents[0] * extents[1] * max(1, input.shape[1])))
    offsets = [torch.arange(extent, device=boxes.device) for extent in extents]
    for begin in range(0, len(rois), step):
        chunk = slice(begin, begin + step)
        rows, columns = (low[chunk, :, None] + offset for low, offset in zip(lows, offsets, strict=True))
        rows_inside, columns_inside = rows < highs[0][chunk, :, None], columns < highs[1][chunk, :, None]
        rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
        # (n, pooled_height, pooled_width, rows of a bin, columns of a bin)
        pixels = rows[:, :, None, :, None] * width + columns[:, None, :, None]
        inside = rows_inside[:, :, None, :, None] & columns_inside[:, None, :, None]
        pixels, inside = (t.reshape(-1, extents[0] * extents[1]) for t in (pixels, inside))  # (num_bins, num_pixels)
        images = rois[chunk, 0].long().repeat_interleave(size[0] * size[1])
        values = table[images[:, None] * (height * width) + pixels]
        highest, index = values.masked_fill(~inside[..., None], -torch.inf).max(1)
        empty = ~inside.any(1, keepdim=True)
        highest = torch.where(empty, 0, highest.clamp(min=-FLT_MAX))
        index = torch.where(empty, -1, pixels.gather(1, index))
        valid = has_area[chunk, None, None, None]
        output[chunk] = torch.where(valid, _unfold(highest, size).to(output.dtype), output[chunk])
        argmax[chunk] = torch.where(valid, _unfold(index, size).to(argmax.dtype), argmax[chunk])


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add each gradient of `grad_output` to `grad_input`, at the pixel of `argmax`."""
    bs, channels, height, width = grad_input.shape
    planes = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # (n, num_channels)
    index = planes[:, :, None] * (height * width) + argmax.flatten(2).clamp(min=0)
    grads = (grad_output * (argmax >= 0)).flatten().to(torch.promote_types(grad_input.dtype, torch.float32))
    total = grads.new_zeros(grad_input.numel()).index_add_(0, index.flatten(), grads)
    grad_input.add_(total.view_as(grad_input))

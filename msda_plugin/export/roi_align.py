"""RoIAlign over the levels of a feature pyramid, for exported graphs.

Source: He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870. mmcv's ONNX form is that of opset 10, which newer
opsets read with another shift.
"""

import torch
import torch.nn.functional as F
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from msda_plugin.layers.reference_points import sizes_tensor


def align_rois(extractor: SingleRoIExtractor, feats: tuple[Tensor, ...], rois: Tensor) -> Tensor:
    """Pool the features of each RoI from its level.

    Args:
        extractor: Of a detector; its layers are mmcv's RoIAlign with average pooling.
        feats: Maps (bs, num_channels, h, w), fine to coarse.
        rois: (n, 5), image index and xyxy in pixels of the image.

    Returns:
        (n, num_channels, output height, output width).
    """
    feats = feats[: extractor.num_inputs]
    levels = extractor.map_roi_levels(rois, len(feats))
    if torch.compiler.is_exporting():
        return _by_embedding_bag(extractor.roi_layers, feats, rois, levels)
    pooled = 0
    for number, (feat, layer) in enumerate(zip(feats, extractor.roi_layers, strict=True)):
        here = (levels == number)[:, None]
        # Elsewhere an empty box, which costs little.
        boxes = torch.cat([rois[:, :1], torch.where(here, rois[:, 1:], 0.0)], 1)
        aligned = _RoIAlign.apply(layer, feat, boxes) if torch.onnx.is_in_onnx_export() else layer(feat, boxes)
        pooled = pooled + torch.where(here[..., None, None], aligned, 0.0)
    return pooled


def _by_embedding_bag(layers: nn.ModuleList, feats: tuple[Tensor, ...], rois: Tensor, levels: Tensor) -> Tensor:
    """RoIAlign in operations that ``torch.export`` knows, although the number of samples depends on the sizes of RoIs.

    A bin is a weighted sum of pixels, the same for all channels: an embedding bag over a table of the pixels of all
    levels.
    """
    layer, device = layers[0], rois.device
    if layer.pool_mode != 'avg':
        raise ValueError(f"RoIAlign has pool_mode={layer.pool_mode!r}; only 'avg' can be exported")
    table = torch.cat([feat.permute(0, 2, 3, 1).flatten(0, 2) for feat in feats]).float()
    sizes = sizes_tensor([feat.shape[-2:] for feat in feats], device)  # (num_levels, 2)
    areas = sizes.prod(1)
    starts = feats[0].shape[0] * (areas.cumsum(0) - areas)
    first = starts[levels] + rois[:, 0].long() * areas[levels]  # (n,), row of the table
    scales = torch.tensor([layer.spatial_scale for layer in layers], device=device)[levels]
    edges = rois.float()[:, 1:].unflatten(1, (2, 2)).flip(2) * scales[:, None, None]  # (n, 2 corners, y and x)
    low, high = (edges - 0.5 if layer.aligned else edges).unbind(1)
    extent = high - low if layer.aligned else (high - low).clamp(min=1)
    sides = extent / torch.tensor(layer.output_size, device=device)  # (n, 2), of a bin
    counts = torch.full_like(sides, layer.sampling_ratio) if layer.sampling_ratio > 0 else sides.ceil()
    counts = counts.long()  # samples of a bin along each side

    height, width = layer.output_size
    per_bin = counts.prod(1)[:, None].expand(-1, height * width).flatten()
    begin = per_bin.cumsum(0) - per_bin  # first sample of each bin
    bins = torch.repeat_interleave(per_bin)  # (num_samples,)
    roi, cell = bins // (height * width), bins % (height * width)
    place = torch.arange(bins.shape[0], device=device) - begin[bins]
    counts, columns = counts[roi], counts[roi][:, 1]
    cells = torch.stack([cell // width, cell % width], 1)
    places = torch.stack([place // columns, place % columns], 1)
    at = low[roi] + (cells + (places + 0.5) / counts) * sides[roi]  # (num_samples, 2), y and x
    limits = sizes[levels][roi]
    inside = ((at >= -1) & (at <= limits)).all(1)
    at = torch.minimum(at.clamp(min=0), limits - 1.0)
    lower = at.floor()
    fraction = at - lower
    lower = lower.long()
    upper = torch.minimum(lower + 1, limits - 1)
    (y0, x0), (y1, x1) = lower.unbind(1), upper.unbind(1)
    rows = torch.stack([y0, y0, y1, y1], 1) * limits[:, 1:] + torch.stack([x0, x1, x0, x1], 1)
    (dy, dx), share = fraction.unbind(1), inside / counts.prod(1)
    weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], 1) * share[:, None]
    pooled = F.embedding_bag(
        (first[roi][:, None] + rows).flatten(), table, begin * 4, mode='sum', per_sample_weights=weights.flatten()
    )
    return pooled.view(-1, height, width, table.shape[1]).permute(0, 3, 1, 2).to(feats[0].dtype)


class _RoIAlign(torch.autograd.Function):
    """One level, as ONNX's RoiAlign."""

    @staticmethod
    def forward(ctx, layer: torch.nn.Module, feat: Tensor, rois: Tensor) -> Tensor:
        return feat.new_zeros(rois.shape[0], feat.shape[1], *layer.output_size)  # of the right shape

    @staticmethod
    def symbolic(graph, layer, feat, rois):
        def columns(first: int, last: int):
            index = graph.op('Constant', value_t=torch.arange(first, last))
            return graph.op('Gather', rois, index, axis_i=1)

        axes = graph.op('Constant', value_t=torch.tensor([1]))
        image = graph.op('Cast', graph.op('Squeeze', columns(0, 1), axes), to_i=torch.onnx.TensorProtoDataType.INT64)
        height, width = layer.output_size
        output = graph.op(
            'RoiAlign',
            feat,
            columns(1, 5),
            image,
            coordinate_transformation_mode_s='half_pixel' if layer.aligned else 'output_half_pixel',
            mode_s=layer.pool_mode,
            output_height_i=height,
            output_width_i=width,
            sampling_ratio_i=max(0, layer.sampling_ratio),
            spatial_scale_f=layer.spatial_scale,
        )
        channels = torch.onnx.symbolic_helper._get_tensor_sizes(feat)[1]
        return output.setType(feat.type().with_sizes([None, channels, height, width]))

"""RoIAlign over the levels of a feature pyramid, for exported graphs.

Source: He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870. mmcv's ONNX form is that of opset 10, which newer
opsets read with another shift.
"""

from functools import partial

import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor


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
    pooled = 0
    for number, (feat, layer) in enumerate(zip(feats, extractor.roi_layers, strict=True)):
        here = (levels == number)[:, None]
        # Elsewhere an empty box, which costs little.
        boxes = torch.where(here, rois[:, 1:], 0.0)
        pool = partial(_RoIAlign.apply, layer) if torch.onnx.is_in_onnx_export() else layer
        aligned = pool(feat, torch.cat([rois[:, :1], boxes], 1))
        pooled = pooled + torch.where(here[..., None, None], aligned, 0.0)
    return pooled


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

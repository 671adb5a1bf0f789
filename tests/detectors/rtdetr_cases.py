"""Small and golden RT-DETRs."""

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from msda_plugin.registry import MODELS


def build(
    depth=18,
    base_channels=8,
    dims=32,
    heads=4,
    num_layers=2,
    num_queries=20,
    num_classes=5,
    expansion=0.5,
    ffn=64,
    frozen=False,
    cross_attn=None,
    dn_cfg=None,
    **fields,
):
    """An RT-DETR; the channels of the neck's inputs follow from the backbone."""
    attention = dict(embed_dims=dims, num_heads=heads, dropout=0.0, batch_first=True)
    scale = (1 if depth < 50 else 4) * base_channels
    backbone = dict(
        type='msda_plugin.ResNetVD',
        depth=depth,
        base_channels=base_channels,
        out_indices=(1, 2, 3),
        norm_eval=frozen,
        norm_cfg=dict(type='BN', requires_grad=not frozen),
        frozen_stages=0 if frozen else -1,
    )
    neck = dict(
        type='msda_plugin.HybridEncoder',
        in_channels=[2 * scale, 4 * scale, 8 * scale],
        out_channels=dims,
        num_heads=heads,
        feedforward_channels=ffn,
        expansion=expansion,
    )
    decoder = dict(
        num_layers=num_layers,
        layer_cfg=dict(
            self_attn_cfg=attention,
            cross_attn_cfg=attention | (cross_attn or {}),
            ffn_cfg=dict(embed_dims=dims, feedforward_channels=ffn),
        ),
    )
    model = dict(
        type='msda_plugin.RTDETR',
        num_queries=num_queries,
        backbone=backbone,
        neck=neck,
        decoder=decoder,
        bbox_head=dict(type='msda_plugin.RTDETRHead', num_classes=num_classes, embed_dims=dims),
        dn_cfg=dict(num_denoising=8) if dn_cfg is None else dn_cfg,
        test_cfg=dict(max_per_img=num_queries),
    )
    for name, value in fields.items():
        model[name] = model[name] | value if isinstance(value, dict) and model.get(name) else value
    return MODELS.build(model)


def samples(objects, shape, sizes=None):
    """Data samples of images (h, w) in a batch of size ``shape``, from labels and boxes (cx, cy, w, h), 0 to 1."""
    result = []
    for (labels, boxes), (height, width) in zip(objects, sizes or [shape] * len(objects), strict=True):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), batch_input_shape=shape
            )
        )
        center, size = boxes.chunk(2, -1)
        corners = torch.cat([center - size / 2, center + size / 2], -1)
        sample.gt_instances = InstanceData(
            labels=labels, bboxes=corners * corners.new_tensor([width, height, width, height])
        )
        result.append(sample)
    return result

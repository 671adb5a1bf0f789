"""SimpleFeaturePyramid: against a plain implementation, at any size, and in detectors."""

import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.nn import functional as F

from msda_plugin.necks.simple_feature_pyramid import SimpleFeaturePyramid
from msda_plugin.registry import MODELS

BACKBONE = dict(
    type='msda_plugin.VisionTransformer',
    img_size=64,
    window_size=3,
    with_cls_token=False,
    arch=dict(embed_dims=32, depth=4, num_heads=2, mlp_ratio=2),
    use_rel_pos=True,
)
PREPROCESSOR = dict(type='mmdet.DetDataPreprocessor', mean=[100.0] * 3, std=[50.0] * 3)
SHAPES = [(75, 101), (64, 96)]


def test_equals_the_plain_implementation():
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(16, 8, num_outs=5).double()
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.normal_()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    outs = neck((x,))
    layers = [list(level) for level in neck.levels]

    def enlarge(x, layer):
        """Pixel (y, x) of the input is the 2x2 block at (2 y, 2 x) of the output."""
        out = torch.einsum('bcyx,coij->boyixj', x, layer.weight).flatten(4, 5).flatten(2, 3)
        return out + layer.bias[:, None, None]

    def norm(x, layer):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    finest = enlarge(F.gelu(norm(enlarge(x, layers[0][0]), layers[0][1])), layers[0][3])
    reduced = F.pad(x, (0, 1, 0, 1), value=-torch.inf).unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    expected = []
    for level, own in zip((finest, enlarge(x, layers[1][0]), x, reduced), layers, strict=True):
        conv1, norm1, conv2, norm2 = own[-4:]
        level = norm(torch.einsum('bcyx,oc->boyx', level, conv1.weight[:, :, 0, 0]), norm1)
        expected.append(norm(F.conv2d(level, conv2.weight, padding=1), norm2))
    expected.append(expected[-1][:, :, ::2, ::2])
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-10)


def test_parameter_count():
    neck = SimpleFeaturePyramid(768, 256)
    enlarging = (4 * 768 * 384 + 384) + 2 * 384 + (4 * 384 * 192 + 192) + (4 * 768 * 384 + 384)
    lateral = (192 + 384 + 768 + 768) * 256
    assert sum(p.numel() for p in neck.parameters()) == enlarging + lateral + 4 * (9 * 256 * 256 + 4 * 256)


@pytest.mark.parametrize(
    'options, sides',
    [
        (dict(), [(20, 28), (10, 14), (5, 7), (3, 4)]),
        (dict(num_outs=6), [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]),
        (dict(scale_factors=(2, 1, 0.5), num_outs=4), [(10, 14), (5, 7), (3, 4), (2, 2)]),
        (dict(scale_factors=[1.0]), [(5, 7)]),
    ],
)
def test_levels(options, sides):
    neck = MODELS.build(dict(type='msda_plugin.SimpleFeaturePyramid', in_channels=8, out_channels=16, **options))
    outs = neck([torch.rand(1, 8, 5, 7)])
    assert [tuple(out.shape) for out in outs] == [(1, 16, *side) for side in sides]
    assert len(neck([torch.rand(2, 8, 1, 1)])) == len(sides)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_finite(dtype):
    torch.manual_seed(0)
    neck = SimpleFeaturePyramid(32, 16, num_outs=5)
    with torch.autocast('cpu', dtype):
        outs = neck([torch.rand(1, 32, 5, 7)])
    sum(out.float().square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(in_channels=[32]), r'in_channels is \[32\]; expected one number'),
        (dict(in_channels=30), 'in_channels is 30; expected .* a multiple of 4'),
        (dict(num_outs=3), 'num_outs is 3, but there are 4 scale_factors'),
        (
            dict(scale_factors=(1, 2)),
            r'scale_factors is \(1, 2\); expected some of \(4.0, 2.0, 1.0, 0.5\), in this order',
        ),
        (dict(scale_factors=(8, 4)), 'scale_factors is'),
        (dict(scale_factors=()), 'scale_factors is'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(**dict(in_channels=32) | options)


@pytest.mark.parametrize('channels', [[], [32, 32], [16]], ids=str)
def test_maps_with_wrong_channels(channels):
    neck = SimpleFeaturePyramid(32)
    with pytest.raises(ValueError, match=f'got {len(channels)} maps of .* expected one map of in_channels=32'):
        neck([torch.rand(1, c, 4, 4) for c in channels])


def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(256, (3, *shape), dtype=torch.uint8, generator=generator) for shape in SHAPES]
    samples = []
    for height, width in SHAPES:
        sample = DetDataSample(
            metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        )
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 10:50, 8:40] = masks[1, 5:30, 50:90] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 10.0, 40.0, 50.0], [50.0, 5.0, 90.0, 30.0]]),
            labels=torch.tensor([0, 2]),
            masks=BitmapMasks(masks.numpy(), height, width),
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def mask_rcnn():
    head = dict(in_channels=16, num_classes=3)
    roi_extractor = dict(type='SingleRoIExtractor', out_channels=16, featmap_strides=[4, 8, 16, 32])
    sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5, neg_pos_ub=-1)
    assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, ignore_iof_thr=-1)
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4)
    proposals = dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
    return dict(
        type='MaskRCNN',
        data_preprocessor=PREPROCESSOR | dict(pad_mask=True),
        backbone=BACKBONE,
        neck=dict(type='msda_plugin.SimpleFeaturePyramid', in_channels=32, out_channels=16, num_outs=5),
        rpn_head=dict(
            type='RPNHead',
            in_channels=16,
            feat_channels=16,
            bbox_coder=coder,
            anchor_generator=dict(
                type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]
            ),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=roi_extractor | dict(roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0)),
            bbox_head=dict(type='Shared2FCBBoxHead', fc_out_channels=32, roi_feat_size=7, bbox_coder=coder, **head),
            mask_roi_extractor=roi_extractor | dict(roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0)),
            mask_head=dict(
                type='FCNMaskHead',
                num_convs=1,
                conv_out_channels=16,
                loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
                **head,
            ),
        ),
        train_cfg=dict(
            rpn=dict(assigner=assigner, sampler=sampler, pos_weight=-1, allowed_border=-1),
            rpn_proposal=proposals,
            rcnn=dict(assigner=assigner, sampler=sampler, mask_size=28, pos_weight=-1),
        ),
        test_cfg=dict(
            rpn=proposals,
            rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10, mask_thr_binary=0.5),
        ),
    )


def deformable_detr():
    attention = dict(embed_dims=16, num_heads=2, dropout=0.0, batch_first=True)
    layer = dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=16, feedforward_channels=32))
    return dict(
        type='msda_plugin.DeformableDETR',
        data_preprocessor=PREPROCESSOR,
        num_queries=10,
        backbone=BACKBONE,
        neck=dict(
            type='msda_plugin.SimpleFeaturePyramid',
            in_channels=32,
            out_channels=16,
            scale_factors=[2, 1, 0.5],
            num_outs=4,
        ),
        encoder=dict(num_layers=1, layer_cfg=layer),
        decoder=dict(num_layers=1, return_intermediate=True, layer_cfg=layer | dict(cross_attn_cfg=dict(attention))),
        positional_encoding=dict(num_feats=8, normalize=True, offset=-0.5),
        bbox_head=dict(
            type='msda_plugin.DeformableDETRHead',
            num_classes=3,
            embed_dims=16,
            sync_cls_avg_factor=True,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, loss_weight=2.0),
            loss_bbox=dict(type='L1Loss', loss_weight=5.0),
            loss_iou=dict(type='GIoULoss', loss_weight=2.0),
        ),
        train_cfg=dict(
            assigner=dict(
                type='HungarianAssigner',
                match_costs=[
                    dict(type='FocalLossCost', weight=2.0),
                    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                    dict(type='IoUCost', iou_mode='giou', weight=2.0),
                ],
            )
        ),
        test_cfg=dict(max_per_img=10),
    )


@pytest.mark.parametrize('config', [mask_rcnn, deformable_detr], ids=lambda config: config.__name__)
def test_detector_trains_and_predicts(config):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = DETECTORS.build(ConfigDict(config()))
    model.init_weights()
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    reached = set()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: reached.add(name) if grad.isfinite().all() else None)
    log = model.train().train_step(batch(), optimizer)
    assert torch.isfinite(log['loss'])
    assert reached == dict(model.named_parameters()).keys()
    with torch.no_grad():
        predictions = model.eval().test_step(batch())
    for prediction, (height, width) in zip(predictions, SHAPES, strict=True):
        boxes = prediction.pred_instances.bboxes
        assert len(boxes) == 10 and boxes.isfinite().all()
        assert boxes.min() >= 0 and boxes[:, 0::2].max() <= width and boxes[:, 1::2].max() <= height
        if 'masks' in prediction.pred_instances:
            assert prediction.pred_instances.masks.shape == (10, height, width)

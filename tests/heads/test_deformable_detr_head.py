"""DeformableDETRHead: losses equal to MMDetection's with one transfer to the host, and the fallback to its code."""

import copy
import inspect
import logging

import mmdet.models.dense_heads.detr_head as mmdet_detr_head
import pytest
import torch
from head_cases import KEYS, LAYERS, QUERIES, assert_same, losses_and_gradients, make_objects, make_predictions
from mmdet.models.losses import FocalLoss
from mmdet.models.task_modules.assigners.match_cost import BBoxL1Cost
from mmengine.structures import InstanceData

from msda_plugin.heads import box_ops, losses, set_prediction
from msda_plugin.registry import MODELS

ASSIGNER = dict(
    type='mmdet.HungarianAssigner',
    match_costs=[
        dict(type='mmdet.FocalLossCost', weight=2.0),
        dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
        dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
    ],
)
FIELDS = dict(
    num_classes=5,
    embed_dims=16,
    num_pred_layer=LAYERS,
    sync_cls_avg_factor=True,
    loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
    loss_bbox=dict(type='mmdet.L1Loss', loss_weight=5.0),
    loss_iou=dict(type='mmdet.GIoULoss', loss_weight=2.0),
    train_cfg=dict(assigner=ASSIGNER),
    test_cfg=dict(max_per_img=10),
)


def make_inputs(counts, num_classes=5, two_stage=True):
    """Predictions (leaves) and ground truth of three images, as ``loss_by_feat`` takes them."""
    proposals = make_predictions(num_classes, 3, KEYS, seed=1) if two_stage else [None, None]
    return [*make_predictions(num_classes, LAYERS, 3, QUERIES), *proposals, *make_objects(counts, num_classes)]


class SquaredCost(BBoxL1Cost):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) ** 2


class HalvedLoss(FocalLoss):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 2


def build(scope, **changes):
    torch.manual_seed(0)
    return MODELS.build(dict(type=f'{scope}.DeformableDETRHead', **copy.deepcopy(FIELDS | changes)))


@pytest.mark.parametrize('two_stage', [False, True])
@pytest.mark.parametrize('counts', [(3, 7, 1), (0, 4, 0), (0, 0, 0), (12, 12, 12), (15, 2, 30)], ids=str)
def test_losses_equal_mmdetections(counts, two_stage):
    ours, theirs = build('msda_plugin'), build('mmdet')
    assert ours.matcher is not None
    inputs = make_inputs(counts, two_stage=two_stage)
    assert_same(ours, theirs, inputs)
    names = set(ours.loss_by_feat(*inputs))
    assert names == {
        f'{prefix}loss_{name}'
        for prefix in ('', 'd0.', 'd1.', *(['enc_'] if two_stage else []))
        for name in ('cls', 'bbox', 'iou')
    }


@pytest.mark.parametrize(
    'changes',
    [
        dict(num_classes=1),
        dict(num_classes=40),
        dict(sync_cls_avg_factor=False),
        dict(
            loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=1.5, alpha=0.4, loss_weight=0.7),
            loss_bbox=dict(type='mmdet.L1Loss', loss_weight=1.3),
            loss_iou=dict(type='mmdet.GIoULoss', loss_weight=3.0, eps=1e-3),
        ),
        dict(loss_cls=dict(type='mmdet.QualityFocalLoss', use_sigmoid=True, beta=1.7, loss_weight=0.7)),
        dict(
            train_cfg=dict(
                assigner=dict(
                    type='mmdet.HungarianAssigner',
                    match_costs=[
                        dict(type='mmdet.FocalLossCost', weight=1.0, alpha=0.4, gamma=1.5, eps=1e-6),
                        dict(type='mmdet.BBoxL1Cost', weight=2.0, box_format='xyxy'),
                        dict(type='mmdet.IoUCost', iou_mode='giou', weight=3.0),
                    ],
                )
            )
        ),
        dict(
            train_cfg=dict(
                assigner=dict(
                    type='mmdet.HungarianAssigner',
                    match_costs=[dict(type='mmdet.BBoxL1Cost', weight=1.0, box_format='xywh')],
                )
            )
        ),
    ],
    ids=['1 class', '40 classes', 'no sync', 'losses', 'quality', 'costs', 'one cost'],
)
def test_settings_of_losses_and_costs(changes):
    ours = build('msda_plugin', **changes)
    assert ours.matcher is not None
    assert_same(ours, build('mmdet', **changes), make_inputs((3, 7, 1), changes.get('num_classes', 5)))


@pytest.mark.parametrize('cost', ['FocalLossCost', 'ClassificationCost'])
def test_softmax_with_a_no_object_class(cost):
    changes = dict(
        loss_cls=dict(type='mmdet.CrossEntropyLoss', loss_weight=2.0, class_weight=[1.0] * 5 + [0.1]),
        train_cfg=dict(
            assigner=dict(
                type='mmdet.HungarianAssigner',
                match_costs=[dict(type=f'mmdet.{cost}', weight=1.0), dict(type='mmdet.BBoxL1Cost', box_format='xywh')],
            )
        ),
    )
    ours = build('msda_plugin', **changes)
    assert ours.matcher is not None
    inputs = [*make_predictions(6, LAYERS, 3, QUERIES), *make_predictions(6, 3, KEYS), *make_objects((3, 7, 1))]
    assert_same(ours, build('mmdet', **changes), inputs)


def test_confident_and_degenerate_predictions():
    inputs = make_inputs((3, 7, 1))
    with torch.no_grad():
        inputs[0][0] += 60  # the sigmoid is 1 in float32
        inputs[0][1] -= 60
        inputs[1][..., :3, 2:] = 0  # boxes without area
    assert_same(build('msda_plugin'), build('mmdet'), inputs)


@pytest.mark.parametrize('sync', [False, True])
def test_normalizes_by_the_mean_over_processes(sync, monkeypatch):
    for module in (mmdet_detr_head, set_prediction):
        monkeypatch.setattr(module, 'reduce_mean', lambda tensor: tensor * 2.5)
    fields = dict(sync_cls_avg_factor=sync)
    assert_same(build('msda_plugin', **fields), build('mmdet', **fields), make_inputs((3, 7, 1)))


def test_all_losses_reach_all_predictions_without_objects():
    """In distributed training, a process without gradients would block the others."""
    inputs = make_inputs((0, 0, 0))
    losses = build('msda_plugin').loss_by_feat(*inputs)
    assert all(loss.requires_grad and loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in losses_and_gradients(build('msda_plugin'), inputs)[1])


def test_one_transfer_to_the_host(monkeypatch):
    transfers = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: transfers.append(tensor.numel()) or to_host(tensor))
    build('msda_plugin').loss_by_feat(*make_inputs((3, 7, 1)))
    assert transfers == [LAYERS * 3 * 7 * QUERIES + 3 * 7 * KEYS]


def test_costs_of_low_precision_predictions_are_float32():
    inputs = make_inputs((3, 7, 1))
    halved = [leaf.detach().bfloat16() for leaf in inputs[:4]] + inputs[4:]
    losses = build('msda_plugin').loss_by_feat(*halved)
    expected = build('mmdet').loss_by_feat(*[leaf.float() for leaf in halved[:4]], *inputs[4:])
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.squeeze(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'changes, reason',
    [
        (dict(loss_cls=dict(type=HalvedLoss, use_sigmoid=True)), 'HalvedLoss'),
        (dict(loss_bbox=dict(type='mmdet.SmoothL1Loss')), 'SmoothL1Loss'),
        (dict(loss_iou=dict(type='mmdet.DIoULoss')), 'DIoULoss'),
        (
            dict(
                train_cfg=dict(
                    assigner=dict(
                        type='mmdet.HungarianAssigner',
                        match_costs=[dict(type='mmdet.FocalLossCost'), dict(type='mmdet.IoUCost', iou_mode='iou')],
                    )
                )
            ),
            'IoUCost',
        ),
        (
            dict(
                train_cfg=dict(
                    assigner=dict(
                        type='mmdet.HungarianAssigner',
                        match_costs=[dict(type='mmdet.FocalLossCost'), dict(type=SquaredCost)],
                    )
                )
            ),
            'SquaredCost',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_unsupported_losses_and_costs_run_mmdetections_code_with_a_warning(changes, reason, monkeypatch):
    logged = []
    monkeypatch.setattr(set_prediction, 'print_log', lambda message, **how: logged.append((message, how['level'])))
    ours = build('msda_plugin', **changes)
    inputs = make_inputs((3, 7, 1))
    assert_same(ours, build('mmdet', **changes), inputs)
    ours.loss_by_feat(*inputs)
    ((message, level),) = logged
    assert ours.matcher is None and reason in message and level == logging.WARNING


@pytest.mark.parametrize('label', [-1, 5])
def test_labels_out_of_range_are_refused(label):
    inputs = make_inputs((3, 7, 1))
    inputs[4][1].labels[2] = label
    with pytest.raises(ValueError, match=rf'labels from .*{label}.* with num_classes=5 they must be 0 to 4'):
        build('msda_plugin').loss_by_feat(*inputs)


def test_labels_out_of_range_are_refused_with_one_class():
    inputs = make_inputs((3, 7, 1), num_classes=1)
    inputs[4][0].labels[0] = 1
    with pytest.raises(ValueError, match='num_classes=1'):
        build('msda_plugin', num_classes=1).loss_by_feat(*inputs)


def test_non_finite_predictions_and_boxes_are_refused():
    inputs = make_inputs((3, 7, 1))
    with torch.no_grad():
        inputs[0][1, 0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match='training has diverged'):
        build('msda_plugin').loss_by_feat(*inputs)
    inputs = make_inputs((3, 7, 1))
    inputs[4][0].bboxes[0, 0] = float('inf')
    with pytest.raises(ValueError, match='ground truth has boxes'):
        build('msda_plugin').loss_by_feat(*inputs)


def test_ignored_regions_are_refused():
    with pytest.raises(ValueError, match='must be None'):
        build('msda_plugin').loss_by_feat(*make_inputs((1, 1, 1)), [InstanceData()])


@pytest.mark.parametrize(
    'fields, coordinates',
    [
        (dict(share_pred_layer=True), (2, 2, 2)),
        (dict(share_pred_layer=False), (2, 4, 4)),
        (dict(share_pred_layer=False, num_pred_layer=LAYERS + 1, as_two_stage=True), (4, 4, 4)),
    ],
)
def test_forward_equals_mmdetections(fields, coordinates):
    ours, theirs = build('msda_plugin', **fields), build('mmdet', **fields)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    hidden_states = torch.randn(LAYERS, 2, QUERIES, 16)
    # One more than there are layers, as in the detector.
    references = [torch.rand(2, QUERIES, size) for size in (*coordinates, 4)]
    for output, expected in zip(ours(hidden_states, references), theirs(hidden_states, references), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_fields_are_explicit():
    assert isinstance(MODELS.build(dict(type='msda_plugin.DeformableDETRHead', num_classes=3)).loss_cls, FocalLoss)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_class'"):
        build('msda_plugin', num_class=3)
    names = inspect.signature(type(build('msda_plugin'))).parameters
    assert {'num_classes', 'share_pred_layer', 'as_two_stage'} < names.keys() and not {'args', 'kwargs'} & names.keys()


@pytest.mark.parametrize('shape', [(4,), (2, 3, 4), (0, 4)], ids=str)
def test_box_formats_are_inverse(shape):
    boxes = torch.rand(shape, dtype=torch.float64)
    torch.testing.assert_close(box_ops.box_xyxy_to_cxcywh(box_ops.box_cxcywh_to_xyxy(boxes)), boxes)
    box = torch.tensor([0.5, 0.4, 0.2, 0.6], dtype=torch.float64)
    expected = torch.tensor([0.4, 0.1, 0.6, 0.7], dtype=torch.float64)
    torch.testing.assert_close(box_ops.box_cxcywh_to_xyxy(box), expected)


def test_generalized_box_iou_of_known_boxes():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [4, 0, 6, 2]])
    # The second box: intersection 1, union 7, hull 9. The third: intersection 0, union 8, hull 12.
    expected = torch.tensor([[1, 1 / 7 - 2 / 9, -4 / 12]])
    torch.testing.assert_close(box_ops.generalized_box_iou(boxes[:1, None], boxes[None]), expected)


def test_focal_loss_equals_its_definition():
    logits = torch.linspace(-4, 4, 12, dtype=torch.float64).view(2, 6)
    positives = torch.tensor([[1, 4], [0, 2]])
    targets = torch.zeros_like(logits).scatter_(1, positives, 1)
    p = torch.where(targets == 1, logits.sigmoid(), 1 - logits.sigmoid())
    alpha = torch.where(targets == 1, 0.3, 0.7).double()
    expected = (-alpha * (1 - p) ** 1.5 * p.log()).sum(1)
    torch.testing.assert_close(losses.focal_loss(logits, positives, 0.3, 1.5), expected)


def test_nms_suppresses_duplicates_within_a_class():
    logits = torch.full((4, 5), -9.0)
    logits[0, 1], logits[1, 1], logits[2, 3], logits[3, 1] = 3.0, 2.0, 1.0, 0.0
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]])
    meta = dict(img_shape=(100, 200), scale_factor=(2.0, 2.0))
    plain = build('msda_plugin', test_cfg=dict(max_per_img=4))
    assert plain._predict_by_feat_single(logits, boxes, meta).labels.tolist() == [1, 1, 3, 1]
    head = build('msda_plugin', test_cfg=dict(max_per_img=4, nms=dict(type='nms', iou_threshold=0.7)))
    kept = head._predict_by_feat_single(logits, boxes, meta)
    assert kept.labels.tolist() == [1, 3, 1]
    torch.testing.assert_close(kept.scores, torch.tensor([3.0, 1.0, 0.0]).sigmoid())
    torch.testing.assert_close(kept.bboxes[0], torch.tensor([30.0, 15.0, 70.0, 35.0]))


@pytest.mark.parametrize('nms', [True, dict(type='nms'), dict(type='nms', iou_threshold=0), 0.7], ids=str)
def test_nms_without_a_threshold_is_refused(nms):
    with pytest.raises(ValueError, match='test_cfg.nms is .*iou_threshold'):
        build('msda_plugin', test_cfg=dict(nms=nms))

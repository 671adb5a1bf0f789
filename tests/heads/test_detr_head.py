"""DETRHead: losses equal to MMDetection's with one transfer to the host."""

import copy
import logging

import mmdet.models.dense_heads.detr_head as mmdet_detr_head
import pytest
import torch
from head_cases import LAYERS, QUERIES, assert_same, losses_and_gradients, make_objects, make_predictions
from mmengine.registry import init_default_scope

from msda_plugin.heads import losses, set_prediction
from msda_plugin.registry import MODELS

CROSS_ENTROPY = dict(
    type='mmdet.CrossEntropyLoss', bg_cls_weight=0.1, use_sigmoid=False, loss_weight=1.0, class_weight=1.0
)
COSTS = [
    dict(type='mmdet.ClassificationCost', weight=1.0),
    dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
]
FIELDS = dict(
    num_classes=5,
    embed_dims=16,
    loss_cls=CROSS_ENTROPY,
    loss_bbox=dict(type='mmdet.L1Loss', loss_weight=5.0),
    loss_iou=dict(type='mmdet.GIoULoss', loss_weight=2.0),
    train_cfg=dict(assigner=dict(type='mmdet.HungarianAssigner', match_costs=COSTS)),
    test_cfg=dict(max_per_img=10),
)
FOCAL = dict(
    loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, loss_weight=2.0),
    train_cfg=dict(
        assigner=dict(
            type='mmdet.HungarianAssigner', match_costs=[dict(type='mmdet.FocalLossCost', weight=2.0), *COSTS[1:]]
        )
    ),
)


def build(scope, **changes):
    torch.manual_seed(0)
    return MODELS.build(dict(type=f'{scope}.DETRHead', **copy.deepcopy(FIELDS | changes)))


def make_inputs(counts, num_outputs=6):
    return [*make_predictions(num_outputs, LAYERS, 3, QUERIES), *make_objects(counts)]


@pytest.mark.parametrize('counts', [(3, 7, 1), (0, 4, 0), (0, 0, 0), (12, 12, 12), (15, 2, 30)], ids=str)
def test_losses_equal_mmdetections(counts):
    ours = build('msda_plugin')
    assert ours.matcher is not None
    assert_same(ours, build('mmdet'), make_inputs(counts))


@pytest.mark.parametrize(
    'changes, num_outputs',
    [
        (dict(sync_cls_avg_factor=True), 6),
        (dict(loss_cls=CROSS_ENTROPY | dict(bg_cls_weight=0.3, loss_weight=0.7, class_weight=2.0)), 6),
        (dict(loss_cls=dict(type='mmdet.CrossEntropyLoss', class_weight=0.5)), 6),
        (dict(loss_cls=dict(type='mmdet.CrossEntropyLoss')), 6),
        (
            dict(
                train_cfg=dict(
                    assigner=dict(
                        type='mmdet.HungarianAssigner',
                        match_costs=[dict(type='mmdet.ClassificationCost', weight=3.0), *COSTS[1:]],
                    )
                )
            ),
            6,
        ),
        (FOCAL, 5),
        (dict(loss_cls=FOCAL['loss_cls']), 5),
    ],
    ids=['sync', 'weights', 'one weight', 'no weight', 'costs', 'focal', 'focal loss, softmax cost'],
)
def test_settings_are_honoured(changes, num_outputs):
    ours = build('msda_plugin', **changes)
    assert ours.matcher is not None
    assert_same(ours, build('mmdet', **changes), make_inputs((3, 7, 1), num_outputs))


@pytest.mark.parametrize('sync', [False, True])
def test_normalizes_by_the_mean_over_processes(sync, monkeypatch):
    for module in (mmdet_detr_head, set_prediction):
        monkeypatch.setattr(module, 'reduce_mean', lambda tensor: tensor * 2.5)
    fields = dict(sync_cls_avg_factor=sync)
    assert_same(build('msda_plugin', **fields), build('mmdet', **fields), make_inputs((3, 7, 1)))


def test_defaults_are_mmdetections():
    init_default_scope('mmdet')  # of the assigner in mmdet's defaults
    ours, theirs = (MODELS.build(dict(type=f'{scope}.DETRHead', num_classes=5)) for scope in ('msda_plugin', 'mmdet'))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.test_cfg == theirs.test_cfg
    assert_same(ours, theirs, make_inputs((3, 7, 1)))
    MODELS.build(dict(type='msda_plugin.DETRHead', num_classes=7))  # the defaults are unchanged by the first build


def test_one_transfer_to_the_host(monkeypatch):
    transfers = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: transfers.append(tensor.numel()) or to_host(tensor))
    build('msda_plugin').loss_by_feat(*make_inputs((3, 7, 1)))
    assert transfers == [LAYERS * 3 * 7 * QUERIES]


def test_costs_of_low_precision_predictions_are_float32():
    inputs = make_inputs((3, 7, 1))
    halved = [leaf.detach().bfloat16() for leaf in inputs[:2]] + inputs[2:]
    result = build('msda_plugin').loss_by_feat(*halved)
    expected = build('mmdet').loss_by_feat(*[leaf.float() for leaf in halved[:2]], *inputs[2:])
    for name, loss in expected.items():
        torch.testing.assert_close(result[name], loss, rtol=1e-5, atol=1e-6)


def test_all_losses_reach_all_predictions_without_objects():
    """In distributed training, a process without gradients would block the others."""
    inputs = make_inputs((0, 0, 0))
    result = build('msda_plugin').loss_by_feat(*inputs)
    assert all(loss.requires_grad and loss.isfinite() for loss in result.values())
    assert all(gradient.isfinite().all() for gradient in losses_and_gradients(build('msda_plugin'), inputs)[1])


@pytest.mark.parametrize(
    'loss_cls, reason',
    [
        (CROSS_ENTROPY | dict(ignore_index=3), 'ignore_index=None'),
        (CROSS_ENTROPY | dict(reduction='sum'), 'CrossEntropyLoss'),
    ],
)
def test_unsupported_losses_run_mmdetections_code_with_a_warning(loss_cls, reason, monkeypatch):
    logged = []
    monkeypatch.setattr(set_prediction, 'print_log', lambda message, **how: logged.append((message, how['level'])))
    ours = build('msda_plugin', loss_cls=loss_cls)
    ((message, level),) = logged
    assert ours.matcher is None and reason in message and level == logging.WARNING
    if 'ignore_index' in loss_cls:
        assert_same(ours, build('mmdet', loss_cls=loss_cls), make_inputs((3, 7, 1)))


@pytest.mark.parametrize('label', [-1, 5])
def test_labels_out_of_range_are_refused(label):
    """Class 5 stands for no object."""
    inputs = make_inputs((3, 7, 1))
    inputs[2][1].labels[2] = label
    with pytest.raises(ValueError, match=rf'labels from .*{label}.* with num_classes=5 they must be 0 to 4'):
        build('msda_plugin').loss_by_feat(*inputs)


@pytest.mark.parametrize('changes', [dict(class_weight=[1.0] * 5), dict(bg_cls_weight='0.1')])
def test_class_weights_must_be_numbers(changes):
    with pytest.raises(TypeError, match=f'{next(iter(changes))} is .*; expected a number: class_weight for all'):
        build('msda_plugin', loss_cls=CROSS_ENTROPY | changes)


def test_ignored_regions_are_refused():
    inputs = make_inputs((1, 1, 1))
    with pytest.raises(ValueError, match='must be None'):
        build('msda_plugin').loss_by_feat(*inputs, inputs[2])


def test_predictions_equal_mmdetections():
    ours, theirs = build('msda_plugin'), build('mmdet')
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(LAYERS, 3, QUERIES, 16)
    for output, expected in zip(ours(hidden), theirs(hidden), strict=True):
        assert torch.equal(output, expected)
    metas = [meta | dict(scale_factor=(2.0, 0.5)) for meta in make_inputs((1, 1, 1))[3]]
    for found, expected in zip(
        ours.predict_by_feat(*ours(hidden), metas), theirs.predict_by_feat(*ours(hidden), metas), strict=True
    ):
        assert all(torch.equal(found[name], expected[name]) for name in ('bboxes', 'scores', 'labels'))


def test_cross_entropy_equals_its_definition():
    logits = torch.linspace(-4, 4, 24, dtype=torch.float64).view(2, 4, 3)
    matched, labels = torch.tensor([[1, 3], [0, 2]]), torch.tensor([[0, 1], [1, 0]])
    weight = torch.tensor([1.0, 2.0, 0.1], dtype=torch.float64)
    targets = torch.tensor([[2, 0, 2, 1], [1, 2, 0, 2]])
    expected = -(weight[targets] * logits.softmax(-1).log().gather(2, targets[..., None])[..., 0]).sum(1)
    torch.testing.assert_close(losses.cross_entropy(logits, matched, labels, weight), expected)

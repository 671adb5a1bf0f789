"""D-FINE's head against losses, matches and gradients of the authors' code."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy
from msda_plugin.heads.dfine_head import DFINEHead, edge_distances, move_edges, union_of_matches
from msda_plugin.heads.matching import Matches, Targets
from msda_plugin.layers.denoising import DenoisingQueries

GOLDEN = Path(__file__).parents[1] / 'golden'
sys.path.insert(0, str(GOLDEN))
import make_dfine  # noqa: E402

SIDE = 128.0
MAL = dict(type='msda_plugin.MatchabilityAwareLoss', gamma=1.5)
# The authors' names of the layers, with three decoder layers.
LAYERS = {'': '', '_aux_0': 'd0.', '_aux_1': 'd1.', '_pre': 'initial_', '_enc_0': 'enc_'}
LAYERS |= {'_dn_0': 'd0.dn_', '_dn_1': 'd1.dn_', '_dn_2': 'dn_', '_dn_pre': 'initial_dn_'}
KINDS = {'vfl': 'cls', 'mal': 'cls', 'bbox': 'bbox', 'giou': 'iou', 'fgl': 'fgl', 'ddf': 'ddf'}


def head(**options):
    return DFINEHead(make_dfine.NUM_CLASSES, embed_dims=16, num_pred_layer=4, eval_layer=2, **options)


def instances(empty=False):
    return [
        InstanceData(
            bboxes=box_cxcywh_to_xyxy(target['boxes'][: 0 if empty else None]) * SIDE,
            labels=target['labels'][: 0 if empty else None],
        )
        for target in make_dfine.targets()
    ]


def losses_of(head, given, objects):
    metas = [dict(img_shape=(SIDE, SIDE))] * 2
    # As in the golden file: three groups of five positive and five negative queries.
    denoising = DenoisingQueries(torch.zeros(2, 30, 16), torch.zeros(2, 30, 4), torch.zeros(50, 50).bool(), 3, 5)
    names = ('logits', 'boxes', 'distributions', 'enc_logits', 'enc_boxes')
    return head.loss_by_feat(*(given[name] for name in names), objects, metas, denoising=denoising)


@pytest.mark.parametrize('classification, loss_cls', [('vfl', None), ('mal', MAL)])
def test_losses_and_gradients_are_those_of_the_authors(classification, loss_cls):
    golden = np.load(GOLDEN / 'dfine_losses.npz')
    given = {key: value.requires_grad_() for key, value in make_dfine.predictions().items()}
    losses = losses_of(head(**({'loss_cls': loss_cls} if loss_cls else {})), given, instances())
    expected = {}
    for key in golden:
        prefix, _, name = key.partition('_loss_')
        if name and prefix == classification:
            kind, layer = name.partition('_')[::2]
            expected[f'{LAYERS[f"_{layer}" if layer else ""]}loss_{KINDS[kind]}'] = float(golden[key])
    # The last layer distills itself in the authors' denoising loss: 0.
    assert expected.pop('dn_loss_ddf', 0) == 0
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-4), name

    sum(losses.values()).backward()
    for name, value in given.items():
        gradient = torch.from_numpy(golden[f'{classification}_grad_{name}'])
        assert (value.grad.flatten()[::97] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_without_objects_only_classes_and_distillation_have_losses():
    given = {key: value.requires_grad_() for key, value in make_dfine.predictions().items()}
    losses = losses_of(head(), given, instances(empty=True))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(loss == 0 for name, loss in losses.items() if name.endswith(('loss_bbox', 'loss_iou', 'loss_fgl')))
    assert losses['loss_cls'] > 0
    sum(losses.values()).backward()
    assert all(value.grad.isfinite().all() for value in given.values())


def test_distances_are_finer_near_zero():
    values = head(reg_max=32, reg_scale=4.0, up=0.5).bin_values
    assert len(values) == 33
    assert values[16] == 0 and torch.equal(values, -values.flip(0))
    assert values[-1] == 4 and values[-2] == pytest.approx(2)  # 2 * up * reg_scale, and half of it
    gaps = values.diff()
    assert (gaps[16:].diff() > 0).all()


def test_edges_move_to_the_expected_box_and_back():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1]])
    expected = torch.tensor([[0.55, 0.45, 0.3, 0.2], [0.3, 0.6, 0.1, 0.1]])
    distances = edge_distances(boxes, expected, torch.tensor(4.0))
    assert torch.allclose(distances[1], torch.zeros(4), atol=1e-5)
    assert torch.allclose(move_edges(boxes, distances, torch.tensor(4.0)), expected, atol=1e-6)
    # The right edge moves by a quarter of the width for a distance of 1, the others stay.
    moved = move_edges(boxes[:1], torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor(4.0))
    assert torch.allclose(moved, torch.tensor([[0.525, 0.5, 0.25, 0.4]]))


def test_union_keeps_the_most_frequent_object_of_a_query():
    targets = Targets(torch.zeros(2, 3).long(), torch.zeros(2, 3, 4), torch.ones(2, 1, 4), [3, 1])
    # Two images of four queries. Query 1 of image 0 gets object 2 twice and object 0 once.
    predictions = torch.tensor([[1, 0, 6], [1, 2, 6], [1, 3, 7]])
    objects = torch.tensor([[0, 1, 3], [2, 1, 3], [2, 1, 3]])
    queries, found = union_of_matches(Matches(predictions, objects), (2, 4), targets)
    assert queries.tolist() == [0, 1, 2, 3, 6, 7]
    assert found.tolist() == [1, 2, 1, 1, 3, 3]


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(reg_max=15), 'reg_max=15 is invalid'),
        (
            dict(loss_cls=dict(type='mmdet.FocalLoss')),
            'loss_cls of DFINEHead is a FocalLoss; expected VarifocalLoss or',
        ),
        (dict(reg_scale=0.0), 'reg_scale=0.0 and up=0.5; expected positive numbers'),
        (
            dict(loss_fgl=dict(type='mmdet.L1Loss')),
            'loss_fgl of DFINEHead is a L1Loss; expected FineGrainedLocalization',
        ),
        (dict(loss_ddf=dict(type='mmdet.L1Loss')), 'loss_ddf of DFINEHead is a L1Loss; expected Decoupled'),
        (dict(loss_bbox=dict(type='mmdet.SmoothL1Loss')), 'loss_bbox of DFINEHead is a SmoothL1Loss; expected L1Loss'),
    ],
)
def test_options_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        head(**options)

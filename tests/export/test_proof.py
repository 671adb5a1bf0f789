"""What counts as the same detections."""

import json

import numpy as np
import pytest
from PIL import Image

from msda_plugin.export import proof
from msda_plugin.export.proof import Agreement, LabeledImages
from msda_plugin.tools.shape_images import CLASSES

BOXES = np.array([[10, 10, 50, 60], [20, 5, 80, 40], [0, 0, 30, 30]], np.float32)
SCORES = np.array([0.9, 0.6, 0.3], np.float32)
LABELS = np.array([2, 0, 1])


def agreement(boxes=BOXES, scores=SCORES, labels=LABELS):
    result = Agreement(1e-3)
    result.add((BOXES, SCORES, LABELS), (boxes, scores, labels), 100)
    return result


def test_detections_match_in_any_order():
    order = [2, 0, 1]
    result = agreement(BOXES[order], SCORES[order], LABELS[order])
    assert result.holds and result.matched == 3 and result.box == result.score == 0


def test_a_moved_box_is_reported_in_pixels():
    moved = BOXES + np.array([[0.05, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    result = agreement(moved)
    assert result.holds and result.box == pytest.approx(0.05, rel=1e-3)
    assert result.relative_box == pytest.approx(5e-4, rel=1e-3)
    assert not agreement(BOXES + 0.2).holds


@pytest.mark.parametrize(
    'changed', [dict(scores=SCORES + 2e-3), dict(labels=np.array([2, 1, 1])), dict(scores=np.array([0.9, 0.4, 0.3]))]
)
def test_other_scores_and_labels_do_not_hold(changed):
    assert not agreement(**changed).holds


def test_a_missing_detection_does_not_hold():
    assert not agreement(BOXES[1:], SCORES[1:], LABELS[1:]).holds
    empty = agreement(BOXES[:0], SCORES[:0], LABELS[:0])
    assert not empty.holds and empty.missing == 3


def test_equal_scores_at_the_end_may_be_other_boxes():
    other = np.concatenate([BOXES[:2], [[60, 60, 90, 90]]]).astype(np.float32)
    result = agreement(other, SCORES + np.array([0, 0, 1e-4], np.float32))
    assert result.holds and result.matched == 2 and result.exchanged == 1
    assert not agreement(other[[2, 1, 0]], SCORES).holds  # the box with the best score is another one


def test_only_exchanges_prove_nothing():
    result = Agreement(1e-3)
    result.add((BOXES, SCORES * 0, LABELS), (BOXES + 30, SCORES * 0, LABELS), 100)
    assert result.exchanged and not result.holds


def test_rows_with_label_minus_1_are_no_detections():
    found = np.pad(BOXES, ((0, 2), (0, 0))), np.pad(SCORES, (0, 2)), np.pad(LABELS, (0, 2), constant_values=-1)
    result = agreement(*found)
    assert result.holds and result.matched == 3
    nothing = Agreement(1e-3)
    nothing.add(tuple(part[:0] for part in found), tuple(part[3:] for part in found), 100)
    assert nothing.holds and nothing.matched == 0


def masks_of(boxes, side=100):
    places = np.arange(side) + 0.5
    inside = (places > boxes[:, :2, None]) & (places < boxes[:, 2:, None])  # (n, 2, side)
    return inside[:, 1, :, None] & inside[:, 0, None]


def with_masks(boxes, masks):
    result = Agreement(1e-3)
    result.add((BOXES, SCORES, LABELS, masks_of(BOXES)), (boxes, SCORES, LABELS, masks), 100)
    return result


def test_masks_are_compared_by_iou():
    masks = masks_of(BOXES)
    same = with_masks(BOXES, masks)
    assert same.holds and same.mask == 1 and same.matched == 3
    masks[2, 0, :6] = False  # 6 of 900 pixels
    close = with_masks(BOXES, masks)
    assert close.holds and close.mask == pytest.approx(894 / 900)
    masks[2, 0] = False  # 30 of 900
    assert not with_masks(BOXES, masks).holds
    assert with_masks(BOXES, masks).different == 1
    half = Agreement(proof.HALF_TOLERANCE)
    half.add((BOXES, SCORES, LABELS, masks_of(BOXES)), (BOXES, SCORES, LABELS, masks), 100)
    assert half.mask_limit == 0.9 and half.holds


def test_boxes_around_masks_may_differ_by_a_pixel():
    shifted = BOXES + np.array([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    assert with_masks(shifted, masks_of(BOXES)).holds
    assert not with_masks(shifted * 2 - BOXES, masks_of(BOXES)).holds  # two pixels
    assert not agreement(shifted).holds  # not boxes without masks
    result = Agreement(1e-3)  # nor boxes that are predicted with the masks
    result.add((BOXES + 0.5, SCORES, LABELS, masks_of(BOXES)), (shifted + 0.5, SCORES, LABELS, masks_of(BOXES)), 100)
    assert not result.holds


@pytest.fixture
def labeled(tmp_path):
    Image.fromarray(np.zeros((64, 100, 3), np.uint8)).save(tmp_path / 'a.png')
    content = dict(
        images=[dict(id=7, file_name='a.png', width=100, height=64)],
        categories=[dict(id=10 + label, name=name) for label, name in enumerate(CLASSES)],
        annotations=[
            dict(id=1, image_id=7, category_id=12, bbox=[10, 10, 40, 50], area=2000, iscrowd=0),
            dict(id=2, image_id=7, category_id=10, bbox=[20, 5, 60, 35], area=2100, iscrowd=0),
        ],
    )
    (tmp_path / 'val.json').write_text(json.dumps(content))
    return tmp_path / 'val.json'


def test_average_precision(labeled):
    data = LabeledImages(labeled, None, CLASSES)
    assert data.average_precision(lambda image: (BOXES[:2], SCORES[:2], LABELS[:2])) == pytest.approx(1, abs=1e-6)
    assert data.average_precision(lambda image: (BOXES[:1], SCORES[:1], LABELS[:1])) == pytest.approx(0.5, abs=1e-6)
    assert data.average_precision(lambda image: (BOXES[:0], SCORES[:0], LABELS[:0])) == 0


def test_annotations_of_other_classes(labeled):
    with pytest.raises(ValueError, match='has the classes circle, square, triangle, star, ring, and the detector dog'):
        LabeledImages(labeled, None, ('dog',))
    labeled.write_text('[]')
    with pytest.raises(ValueError, match='is not a COCO annotation file'):
        LabeledImages(labeled, None, CLASSES)


def test_a_median_of_at_least_three_runs(monkeypatch):
    monkeypatch.setattr(proof, 'SECONDS', 0)
    runs = []
    assert proof.median_time(runs.append, [['a'], ['b']]) >= 0
    assert runs == [['a'], ['b'], ['a']]

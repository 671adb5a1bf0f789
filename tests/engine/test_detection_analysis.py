"""Numbers and mistakes: computed by hand, and compared with COCOeval on its own."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msda_plugin.engine.detection_analysis import DetectedImage, analyze

CAT, DOG, COW = range(3)


def image(truths=(), found=(), ignored=()):
    """``truths``: (label, box); ``found``: (label, score, box); ``ignored``: indices of truths."""
    return DetectedImage(
        path='a.png',
        boxes=np.array([box for _, box in truths], float).reshape(-1, 4),
        labels=np.array([label for label, _ in truths], int),
        ignored=np.isin(np.arange(len(truths)), ignored),
        found=np.array([box for *_, box in found], np.float32).reshape(-1, 4),
        found_labels=np.array([label for label, *_ in found], int),
        scores=np.array([score for _, score, _ in found], np.float32),
    )


A, B, C = (0, 0, 10, 10), (20, 0, 40, 20), (50, 50, 80, 80)
SHIFTED = (5, 0, 15, 10)  # IoU with A: 50 / 150
CLOSE = (0, 0, 10, 8)  # IoU with A: 0.8


def case():
    """Three images of two classes, the last one without a box."""
    return [
        image(
            [(CAT, A), (DOG, B), (DOG, C)],
            [(CAT, 0.9, A), (CAT, 0.8, CLOSE), (CAT, 0.7, B), (DOG, 0.2, C), (CAT, 0.6, SHIFTED)],
        ),
        image([(CAT, A)], [(CAT, 0.5, SHIFTED)]),
        image([], [(DOG, 0.95, A)]),
    ]


def test_by_hand():
    found = analyze(case(), 3, score_thr=0.3)
    # The cat of the first image is found with the highest score, the one of the second image never: precision 1 up to
    # recall 0.5, which 51 of the 101 levels reach.
    assert found.ap50[CAT] == pytest.approx(51 / 101)
    # The detection of the dog at C comes after a false positive, which has a higher score.
    assert found.ap50[DOG] == pytest.approx(0.5 * 51 / 101)
    assert np.isnan(found.ap[COW]) and np.isnan(found.precisions[:, COW]).all()
    assert found.num_boxes.tolist() == [2, 2, 0] and found.num_images.tolist() == [2, 1, 0]
    assert found.hits.tolist() == [1, 0, 0] and found.false_alarms.tolist() == [4, 1, 0]
    assert found.confusion.tolist() == [
        [1, 0, 0, 1],  # cats: one right, one missed
        [1, 0, 0, 1],  # dogs: the one at B is taken for a cat, the one at C has a score below the threshold
        [0, 0, 0, 0],
        [3, 1, 0, 0],  # without an object: CLOSE, and SHIFTED twice; the dog of the last image
    ]
    kinds = [(mistake.image, mistake.box, mistake.kind, mistake.other) for mistake in found.false_positives]
    assert kinds == [
        (2, 0, 'background', None),
        (0, 1, 'duplicate', 0),
        (0, 2, 'class', 1),
        (0, 4, 'location', 0),
        (1, 0, 'location', 0),
    ]
    assert [mistake.iou for mistake in found.false_positives] == pytest.approx([0, 0.8, 1, 1 / 3, 1 / 3])
    kinds = [(mistake.image, mistake.box, mistake.kind, mistake.other) for mistake in found.misses]
    assert kinds == [(0, 2, 'score', 3), (0, 1, 'class', 2), (1, 0, 'location', 0)]  # areas 900, 400, 100
    assert found.score_thr == 0.3


def test_a_lower_threshold_finds_more():
    found = analyze(case(), 3, score_thr=0.1)
    assert found.hits.tolist() == [1, 1, 0] and [mistake.box for mistake in found.misses] == [1, 0]
    assert found.confusion[DOG].tolist() == [1, 1, 0, 0]


def test_the_threshold_has_the_highest_f1():
    images = [
        image([(CAT, A), (CAT, B)], [(CAT, 0.805, A), (CAT, 0.605, B), (CAT, 0.4, C), (CAT, 0.3, (90, 0, 99, 9))])
    ]
    # F1: 1 with two detections, between the scores 0.4 and 0.605; 0.41 to 0.6, of which 0.51 is in the middle.
    best = analyze(images, 1)
    assert best.score_thr == pytest.approx(0.51) and best.has_best_f1
    wrong = analyze([image([(CAT, A)], [(CAT, 0.9, C)])], 1)
    assert wrong.score_thr == 0.3 and not wrong.has_best_f1
    assert not analyze(images, 1, score_thr=0.5).has_best_f1


def test_ignored_objects_are_neither_right_nor_wrong():
    found = analyze([image([(CAT, A), (CAT, B)], [(CAT, 0.9, A), (CAT, 0.8, B)], ignored=[1])], 1, score_thr=0.3)
    assert found.confusion.tolist() == [[1, 0], [0, 0]] and found.ap[CAT] == pytest.approx(1)
    assert not found.false_positives and not found.misses and found.num_boxes.tolist() == [1]
    missed = analyze([image([(CAT, A), (CAT, B)], ignored=[1])], 1)
    assert [mistake.box for mistake in missed.misses] == [0]


def test_at_most_100_detections_of_a_class_count():
    boxes = [(CAT, 0.9 - 0.001 * index, (200 + 20 * index, 0, 210 + 20 * index, 10)) for index in range(100)]
    found = analyze([image([(CAT, A)], [*boxes, (CAT, 0.5, A)])], 1, score_thr=0.3, num_mistakes=200)
    assert found.ap[CAT] == 0 and found.confusion.tolist() == [[0, 1], [100, 0]] and len(found.false_positives) == 100


def test_the_worst_mistakes_come_first():
    truths = [(CAT, (0, 30 * index, 10 + index, 30 * index + 10)) for index in range(9)]
    found = [(CAT, 0.1 * index, (500, 30 * index, 520, 30 * index + 20)) for index in range(1, 9)]
    worst = analyze([image(truths, found)], 1, num_mistakes=3)
    assert [mistake.box for mistake in worst.false_positives] == [7, 6, 5]
    assert [mistake.box for mistake in worst.misses] == [8, 7, 6]


@pytest.mark.parametrize('truths, found', [((), ()), ([(CAT, A)], ()), ((), [(CAT, 0.9, A)])])
def test_nothing_to_match(truths, found):
    result = analyze([image(truths, found)], 2)
    assert result.confusion.tolist() == [[0, 0, len(truths)], [0, 0, 0], [len(found), 0, 0]]
    assert (len(result.misses), len(result.false_positives)) == (len(truths), len(found))
    assert np.isnan(result.ap).tolist() == [not truths, True] and result.score_thr == 0.3
    if truths:
        assert result.ap[0] == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match='at least one image'):
        analyze([], 2)
    with pytest.raises(ValueError, match='labels must be from 0 to 1, got 0 to 2'):
        analyze([image([(CAT, A)], [(COW, 0.9, A)])], 2)


# ---- random data ----------------------------------------------------------------------------------------------------
def random_images(seed=3, count=40, num_classes=5):
    """Objects and detections near them, some with another class, some anywhere; an ignored object here and there."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        truths, found = [], []
        for _ in range(random.integers(0, 7)):
            corner, size = random.uniform(0, 300, 2), random.uniform(10, 90, 2)
            box, label = np.concatenate([corner, corner + size]), int(random.integers(num_classes - 1))  # not the last
            truths.append((label, box))
            for _ in range(random.integers(0, 4)):
                near = box + random.normal(0, 0.12, 4) * np.tile(size, 2)
                shown = int(random.integers(num_classes)) if random.random() < 0.5 else label
                found.append((shown, random.random(), near))
        ignored = np.flatnonzero(random.random(len(truths)) < 0.1)
        images.append(image(truths, found, ignored))
    return images


def coco_eval(images, num_classes):
    """COCOeval with its own settings, by the way of its result format."""
    coco = COCO()
    truths, results = [], []
    for number, item in enumerate(images):
        for box, label, ignored in zip(item.boxes, item.labels, item.ignored, strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            truths.append(
                dict(id=len(truths) + 1, image_id=number, category_id=int(label) + 1, bbox=xywh, area=xywh[2] * xywh[3])
                | dict(iscrowd=int(ignored))
            )
        for box, label, score in zip(item.found.astype(float), item.found_labels, item.scores, strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append(dict(image_id=number, category_id=int(label) + 1, bbox=xywh, score=float(score)))
    coco.dataset = dict(
        images=[dict(id=number) for number in range(len(images))],
        categories=[dict(id=label + 1, name=str(label)) for label in range(num_classes)],
        annotations=truths,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_ap_is_that_of_coco():
    images = random_images()
    found, expected = analyze(images, 5), coco_eval(images, 5)
    for ours, theirs in zip((found.ap, found.ap50, found.ap75), expected.stats[:3], strict=True):
        assert np.nanmean(ours) == pytest.approx(theirs, abs=1e-12) and 0.05 < theirs < 0.95
        assert np.isnan(ours).tolist() == [False] * 4 + [True]
    precision = expected.eval['precision'][0, :, :4, 0, 2]
    np.testing.assert_array_equal(found.precisions[:, :4], precision)


def test_confusion_adds_up():
    images = random_images()
    found = analyze(images, 5, score_thr=0.4, num_mistakes=1000)
    assert found.confusion[:-1].sum(axis=1).tolist() == found.num_boxes.tolist()
    assert np.diag(found.confusion)[:-1].tolist() == found.hits.tolist()
    assert found.confusion[:, :-1].sum(axis=0).tolist() == (found.hits + found.false_alarms).tolist()
    off = found.confusion[:-1, :-1] - np.diag(found.hits)
    assert off.sum() > 5 and found.confusion[-1, :-1].sum() > 5 and found.confusion[:-1, -1].sum() > 5
    assert len(found.misses) == found.num_boxes.sum() - found.hits.sum()
    above = [mistake for mistake in found.false_positives if images[mistake.image].scores[mistake.box] >= 0.4]
    assert len(above) == found.false_alarms.sum()
    scores = [images[mistake.image].scores[mistake.box] for mistake in found.false_positives]
    assert scores == sorted(scores, reverse=True)


def test_confusion_is_that_of_supervision():
    """Where no two objects or detections compete for a match, every definition gives the same matrix."""
    supervision = pytest.importorskip('supervision')
    random = np.random.default_rng(8)
    images = []
    for _ in range(12):
        truths, found = [], []
        for place in range(6):
            box = np.array([60 * place, 0, 60 * place + 40, 40], float)
            label, case = int(random.integers(4)), random.random()
            if case < 0.85:
                truths.append((label, box))
            if case > 0.15:
                shown = int(random.integers(4)) if random.random() < 0.3 else label
                found.append((shown, random.uniform(0.3, 1), box + random.uniform(-6, 6, 4)))
        images.append(image(truths, found))
    theirs = supervision.ConfusionMatrix.from_detections(
        predictions=[
            supervision.Detections(item.found, class_id=item.found_labels, confidence=item.scores) for item in images
        ],
        targets=[supervision.Detections(item.boxes.astype(np.float32), class_id=item.labels) for item in images],
        classes=list('abcd'),
        conf_threshold=0.5,
        iou_threshold=0.5,
    ).matrix
    ours = analyze(images, 4, score_thr=0.5).confusion
    np.testing.assert_array_equal(ours, theirs)
    assert (ours[:-1, :-1] - np.diag(np.diag(ours))[:-1, :-1]).sum() > 3

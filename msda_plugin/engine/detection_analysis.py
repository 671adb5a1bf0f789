"""What a detector gets right and wrong on a data set: pycocotools' COCOeval, and what its matches tell of each box."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_THR = 0.5  # of the matches
MAX_DETECTIONS = 100  # per image and class, as in COCO's AP
LOCATED = 0.1  # IoU above which an unmatched box belongs to an object, but is inaccurate
DEFAULT_SCORE_THR = 0.3  # where no threshold finds a box; as demo
SCORE_THRS = np.arange(1, 100) / 100


@dataclass(frozen=True)
class DetectedImage:
    """True and predicted boxes of an image, x1 y1 x2 y2 in its pixels.

    Attributes:
        path: The image file.
        boxes: (N, 4), true.
        labels: (N,), indices of the classes.
        ignored: (N,) bool: crowds and difficult objects. Detections on them are neither right nor wrong.
        found: (M, 4), predicted.
        found_labels: (M,), indices of the classes.
        scores: (M,), 0-1.
    """

    path: str
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    found: np.ndarray
    found_labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Mistake:
    """A false positive or a missed object.

    Attributes:
        image: Index of the image.
        box: Index of the predicted box, or of the missed true one.
        kind: Of a false positive, ``'duplicate'`` (the object has a detection with a higher score), ``'class'`` (IoU ≥
            0.5 with an object of another class), ``'location'`` (IoU 0.1-0.5 with an object of the class), or
            ``'background'``. Of a missed object, ``'score'`` (its detection is below the threshold), ``'class'`` (a
            detection of another class has IoU ≥ 0.5), ``'location'`` (a detection of the class has IoU 0.1-0.5) or
            ``'nothing'``. Detections of missed objects other than ``'score'`` reach the threshold.
        other: Index of the true box, or of the detection, that the kind refers to; None for ``'background'`` and
            ``'nothing'``.
        iou: Their IoU; 0 without one.
    """

    image: int
    box: int
    kind: str
    other: int | None = None
    iou: float = 0.0


@dataclass(frozen=True)
class Analysis:
    """Accuracy and mistakes on a data set; C classes. NaN: the class has no true box.

    Attributes:
        ap, ap50, ap75: (C,), COCO's average precision at IoU 0.50-0.95, 0.50 and 0.75, at most 100 detections per image
            and class.
        recalls: (R,), recall levels of ``precisions``.
        precisions: (R, C), COCO's interpolated precision at IoU 0.5.
        num_images, num_boxes: (C,), images with a true box of the class, and true boxes.
        score_thr: Minimum score for all of the following.
        has_best_f1: Whether that is the threshold with the highest F1; False if it was given, or all have an F1 of 0.
        hits, false_alarms: (C,), true and false positives of COCO at IoU 0.5.
        confusion: (C + 1, C + 1), rows true, columns predicted. The last row counts detections without an object, the
            last column objects without a detection.
        false_positives: The unmatched detections with the highest scores, also below ``score_thr``; highest first.
        misses: The largest true boxes without a detection of their class that reaches the threshold; largest first.
    """

    ap: np.ndarray
    ap50: np.ndarray
    ap75: np.ndarray
    recalls: np.ndarray
    precisions: np.ndarray
    num_images: np.ndarray
    num_boxes: np.ndarray
    score_thr: float
    has_best_f1: bool
    hits: np.ndarray
    false_alarms: np.ndarray
    confusion: np.ndarray
    false_positives: list[Mistake]
    misses: list[Mistake]


def analyze(
    images: Sequence[DetectedImage], num_classes: int, *, score_thr: float | None = None, num_mistakes: int = 24
) -> Analysis:
    """Evaluate detections as COCO does, and sort out the mistakes.

    Detections and objects are matched by COCOeval at IoU 0.5, within the class, from the highest score down. For the
    confusion matrix, detections that are left are matched with objects that are left, of any class, in the same way.

    Args:
        images: At least one image.
        num_classes: Number of classes.
        score_thr: Minimum score of a detection for precision, recall, the confusion matrix and misses; None: the one of
            0.01, 0.02, … 0.99 with the highest F1 over all boxes, in the middle if several have it; 0.3 if none finds a
            box.
        num_mistakes: Maximum number of false positives, and of misses, to return.

    Raises:
        ValueError: If there is no image, or a label is not below ``num_classes``.
    """
    if not images:
        raise ValueError('expected at least one image, got none')
    labels = np.concatenate([np.concatenate([image.labels, image.found_labels]) for image in images])
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f'labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}')
    evaluation = _evaluate(images, num_classes)
    precision = evaluation.eval['precision'][..., 0, 0]  # (IoU thresholds, R, C), -1 without true boxes
    precision = np.where(precision < 0, np.nan, precision)
    aps = precision.mean(axis=1)  # (IoU thresholds, C)
    matches = _Matches(images, evaluation)
    best_f1 = matches.best_threshold() if score_thr is None else None
    score_thr = next(value for value in (score_thr, best_f1, DEFAULT_SCORE_THR) if value is not None)
    counted = [image.labels[~image.ignored] for image in images]
    shown = [matches.counts[i] & (image.scores >= score_thr) for i, image in enumerate(images)]
    right = [shown[i] & (matches.truth[i] >= 0) for i in range(len(images))]

    def per_class(labels: Sequence[np.ndarray]) -> np.ndarray:
        return np.bincount(np.concatenate(labels).astype(int), minlength=num_classes)

    confusion = np.zeros((num_classes + 1, num_classes + 1), int)
    wrong, missed = [], []  # (rank, image, box)
    for i, image in enumerate(images):
        hit = np.zeros(len(image.labels), bool)
        hit[matches.truth[i][right[i]]] = True
        confusion += _confusion(image, hit, right[i], shown[i] & ~right[i], num_classes)
        unmatched = np.flatnonzero(matches.counts[i] & (matches.truth[i] < 0))
        wrong += [(-float(image.scores[box]), i, int(box)) for box in unmatched]
        missed += [(-_area(image.boxes[box]), i, int(box)) for box in np.flatnonzero(~hit & ~image.ignored)]
    false_positives = [_false_positive(i, images[i], box) for _, i, box in sorted(wrong)[:num_mistakes]]
    misses = [_miss(i, images[i], box, shown[i], matches.truth[i]) for _, i, box in sorted(missed)[:num_mistakes]]
    return Analysis(
        ap=aps.mean(axis=0),
        ap50=aps[0],
        ap75=aps[5],
        recalls=evaluation.params.recThrs,
        precisions=precision[0],
        num_images=per_class([np.unique(labels) for labels in counted]),
        num_boxes=per_class(counted),
        score_thr=score_thr,
        has_best_f1=best_f1 is not None,
        hits=per_class([image.found_labels[right[i]] for i, image in enumerate(images)]),
        false_alarms=per_class([image.found_labels[shown[i] & ~right[i]] for i, image in enumerate(images)]),
        confusion=confusion,
        false_positives=false_positives,
        misses=misses,
    )


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, float).reshape(-1, 4)
    return np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def _ious(image: DetectedImage) -> np.ndarray:
    """(M, N), of predicted and true boxes."""
    if not len(image.found) or not len(image.boxes):
        return np.zeros((len(image.found), len(image.boxes)))
    return mask.iou(_xywh(image.found), _xywh(image.boxes), np.zeros(len(image.boxes), int))


# ---- COCOeval -------------------------------------------------------------------------------------------------------
def _evaluate(images: Sequence[DetectedImage], num_classes: int) -> COCOeval:
    """COCOeval after ``accumulate``. Images and boxes count from 1: COCOeval takes a match with id 0 for no match."""
    truths, found = [], []
    for number, image in enumerate(images, 1):
        for box, label, ignored in zip(_xywh(image.boxes), image.labels, image.ignored, strict=True):
            truths.append(_annotation(len(truths) + 1, number, label, box) | dict(iscrowd=int(ignored)))
        for box, label, score in zip(_xywh(image.found), image.found_labels, image.scores, strict=True):
            found.append(_annotation(len(found) + 1, number, label, box) | dict(score=float(score)))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(*(_coco(len(images), num_classes, boxes) for boxes in (truths, found)), iouType='bbox')
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.params.catIds = list(range(num_classes))
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _annotation(number: int, image: int, label: int, box: np.ndarray) -> dict:
    return dict(id=number, image_id=image, category_id=int(label), bbox=box.tolist(), area=float(box[2] * box[3]))


def _coco(num_images: int, num_classes: int, annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=number) for number in range(1, num_images + 1)],
        categories=[dict(id=label, name=str(label)) for label in range(num_classes)],
        annotations=annotations,
    )
    coco.createIndex()
    return coco


class _Matches:
    """COCOeval's matches at IoU 0.5, image by image.

    Attributes:
        truth: (M,) for each image: index of the true box that a detection is matched with, -1 without one.
        counts: (M,) bool for each image: False for detections on ignored objects, and beyond `MAX_DETECTIONS`.
    """

    def __init__(self, images: Sequence[DetectedImage], evaluation: COCOeval) -> None:
        self.truth = [np.full(len(image.found), -1) for image in images]
        self.counts = [np.zeros(len(image.found), bool) for image in images]
        self._scores = np.concatenate([image.scores for image in images])
        self._num_boxes = sum(int((~image.ignored).sum()) for image in images)
        first_true = np.cumsum([0, *(len(image.boxes) for image in images)])
        first_found = np.cumsum([0, *(len(image.found) for image in images)])
        for entry in filter(None, evaluation.evalImgs):
            i = entry['image_id'] - 1
            detections = np.array(entry['dtIds'], int) - 1 - first_found[i]
            matched, ignored = entry['dtMatches'][0].astype(int), entry['dtIgnore'][0]
            self.truth[i][detections] = np.where((matched > 0) & ~ignored, matched - 1 - first_true[i], -1)
            self.counts[i][detections] = ~ignored

    def best_threshold(self) -> float | None:
        """The score threshold with the highest F1, 2 TP / (detections + true boxes); None if all have an F1 of 0."""
        counts, hits = np.concatenate(self.counts), np.concatenate(self.truth) >= 0
        detections = np.array([(counts & (self._scores >= score)).sum() for score in SCORE_THRS])
        right = np.array([(hits & (self._scores >= score)).sum() for score in SCORE_THRS])
        if not right.any():
            return None
        f1 = 2 * right / (detections + self._num_boxes)
        best = np.flatnonzero(f1 == f1.max())
        return float(SCORE_THRS[best[len(best) // 2]])


# ---- mistakes -------------------------------------------------------------------------------------------------------
def _confusion(
    image: DetectedImage, hit: np.ndarray, right: np.ndarray, wrong: np.ndarray, num_classes: int
) -> np.ndarray:
    confusion = np.zeros((num_classes + 1, num_classes + 1), int)
    np.add.at(confusion, (image.found_labels[right], image.found_labels[right]), 1)
    free, ious = ~hit & ~image.ignored, _ious(image)
    for detection in sorted(np.flatnonzero(wrong), key=lambda index: -image.scores[index]):
        candidates = np.where(free, ious[detection], 0.0)
        if candidates.max(initial=0.0) >= IOU_THR:
            best = candidates.argmax()
            free[best] = False
            confusion[image.labels[best], image.found_labels[detection]] += 1
        else:
            confusion[num_classes, image.found_labels[detection]] += 1
    np.add.at(confusion, (image.labels[free], num_classes), 1)
    return confusion


def _false_positive(i: int, image: DetectedImage, box: int) -> Mistake:
    same = ~image.ignored & (image.labels == image.found_labels[box])
    other = ~image.ignored & ~same
    kinds = (('duplicate', same, IOU_THR), ('class', other, IOU_THR), ('location', same, LOCATED))
    return _mistake(i, box, _ious(image)[box], kinds, 'background')


def _miss(i: int, image: DetectedImage, box: int, shown: np.ndarray, truth: np.ndarray) -> Mistake:
    same = image.found_labels == image.labels[box]
    kinds = (('class', shown & ~same, IOU_THR), ('score', truth == box, IOU_THR), ('location', shown & same, LOCATED))
    return _mistake(i, box, _ious(image)[:, box], kinds, 'nothing')


def _mistake(
    i: int, box: int, ious: np.ndarray, kinds: Sequence[tuple[str, np.ndarray, float]], otherwise: str
) -> Mistake:
    """The first kind with a box of at least its IoU."""
    for kind, candidates, least in kinds:
        among = np.where(candidates, ious, -1.0)
        if among.max(initial=-1.0) >= least:
            return Mistake(i, box, kind, int(among.argmax()), float(among.max()))
    return Mistake(i, box, otherwise)

"""Compares an exported file with PyTorch: the same detections, and the time of both."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmdet.structures import DetDataSample
from scipy.optimize import linear_sum_assignment
from torch import nn

from msda_plugin.engine.images import read_image
from msda_plugin.export.runtimes import Detections

# Largest difference of a box, relative to the longer side of the image, and of a score.
TOLERANCE = 1e-3
HALF_TOLERANCE = 3e-2
MASK_IOU, HALF_MASK_IOU = 0.99, 0.9  # smallest IoU of the masks of a pair
SECONDS = 2.0  # of runs that are timed
IMPOSSIBLE = 1e6  # cost of a pair with different labels


@dataclass
class Agreement:
    """How far the detections of a file are from PyTorch's.

    Attributes:
        tolerance: Largest allowed difference of a box relative to the longer side of the image, and of a score.
        matched: Pairs of detections with the same label.
        exchanged: Pairs of different boxes whose scores tie with the lowest one: rounding decides which of them are in
            the top-k.
        box: Largest difference of a coordinate of a pair, pixels.
        relative_box: The same, relative to the longer side of the image.
        score: Largest difference of the scores of a pair.
        missing: Other detections without a counterpart.
        mask: Smallest IoU of the masks of a pair; None without masks.
        different: Pairs past the tolerance. Boxes around masks are whole pixels, and may differ by one.
    """

    tolerance: float
    matched: int = 0
    exchanged: int = 0
    box: float = 0.0
    relative_box: float = 0.0
    score: float = 0.0
    missing: int = 0
    mask: float | None = None
    different: int = 0

    @property
    def mask_limit(self) -> float:
        """Smallest allowed IoU of the masks of a pair."""
        return MASK_IOU if self.tolerance < HALF_TOLERANCE else HALF_MASK_IOU

    @property
    def holds(self) -> bool:
        compared = self.matched > 0 or self.exchanged == 0
        return compared and self.missing == 0 and self.different == 0

    def add(self, expected: Detections, found: Detections, side: int) -> None:
        """Match the detections of an image by box, score and label, not by row.

        Args:
            expected, found: Boxes (n, 4) in pixels, scores (n,), labels (n,) and, from detectors that predict them,
                masks (n, height, width) bool; rows with label -1 are none.
            side: Longer side of the image, pixels.
        """
        expected, found = (tuple(part[detections[2] >= 0] for part in detections) for detections in (expected, found))
        cost = np.abs(expected[0][:, None] - found[0]).max(-1, initial=0) / side + np.abs(
            expected[1][:, None] - found[1]
        )
        cost = np.where(expected[2][:, None] == found[2], cost, IMPOSSIBLE)
        rows, columns = linear_sum_assignment(cost)
        floor = max((scores.min() for scores in (expected[1], found[1]) if len(scores)), default=0.0)

        with_masks = len(expected) > 3
        around_masks = with_masks and all((boxes == boxes.round()).all() for boxes in (expected[0], found[0]))
        limit = max(self.tolerance * side, float(around_masks))

        def ties(score: float) -> bool:
            return score <= floor + self.tolerance

        for row, column in zip(rows, columns, strict=True):
            box = float(np.abs(expected[0][row] - found[0][column]).max())
            score = float(abs(expected[1][row] - found[1][column]))
            same = expected[2][row] == found[2][column]
            mask = _mask_iou(expected[3][row], found[3][column]) if with_masks else 1.0
            within = same and box <= limit and score <= self.tolerance
            if not within and ties(expected[1][row]) and ties(found[1][column]):
                self.exchanged += 1
            elif not same:
                self.missing += 1
            else:
                self.matched += 1
                self.box, self.score = max(self.box, box), max(self.score, score)
                self.relative_box = max(self.relative_box, box / side)
                self.different += not within or mask < self.mask_limit
                if with_masks:
                    self.mask = min(1.0 if self.mask is None else self.mask, mask)
        self.missing += abs(len(expected[1]) - len(found[1]))


def _mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def predict_inputs(model: nn.Module, inputs: Sequence[np.ndarray]) -> list[Detections]:
    """The detections of the model's own code in inputs of one size, as the file takes them.

    Args:
        model: From `msda_plugin.engine.inference.load_detector`.
        inputs: Each (height, width, 3) uint8, RGB.
    """
    with torch.no_grad():
        found = [sample.pred_instances for sample in model.test_step(_data(inputs))]
    names = ('bboxes', 'scores', 'labels', *(['masks'] if 'masks' in found[0] else []))
    return [
        tuple((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy() for tensor in tensors)
        for tensors in ([sample[name] for name in names] for sample in found)
    ]


def _data(inputs: Sequence[np.ndarray]) -> dict:
    """Inputs of one size as MMDetection's dataset gives them."""
    samples = []
    for pixels in inputs:
        size = pixels.shape[:2]
        samples.append(DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0)))
    tensors = [torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1))) for pixels in inputs]
    return dict(inputs=tensors, data_samples=samples)


def compare(
    expected: Sequence[Detections], found: Sequence[Detections], inputs: Sequence[np.ndarray], tolerance: float
) -> Agreement:
    """Compare the detections in several inputs."""
    agreement = Agreement(tolerance)
    for first, second, pixels in zip(expected, found, inputs, strict=True):
        agreement.add(first, second, max(pixels.shape[:2]))
    return agreement


# ---- features -------------------------------------------------------------------------------------------------------
@dataclass
class FeatureAgreement:
    """How far the feature maps of a file are from PyTorch's.

    Attributes:
        tolerance: Largest allowed difference, relative to the largest absolute value of the map.
        maps: Number of compared maps.
        difference: Largest absolute difference.
        relative: Largest difference relative to the largest absolute value of its map.
        masks_differ: The padding masks are not equal, or a map has another shape.
    """

    tolerance: float
    maps: int = 0
    difference: float = 0.0
    relative: float = 0.0
    masks_differ: bool = False

    @property
    def holds(self) -> bool:
        return self.maps > 0 and not self.masks_differ and self.relative <= self.tolerance


def predict_features(model: nn.Module, inputs: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """The maps of the model's neck for inputs of one size, (channels, h, w) each, and the padding mask of each input.

    Args:
        model: A detector, from `msda_plugin.engine.inference.load_detector`.
        inputs: Each (height, width, 3) uint8, RGB.
    """
    with torch.no_grad():
        data = model.data_preprocessor(_data(inputs), False)
        maps = [level.float().cpu().numpy() for level in model.extract_feat(data['inputs'])]
    results = []
    for image, sample in enumerate(data['data_samples']):
        mask = np.ones(sample.batch_input_shape, bool)
        mask[: sample.img_shape[0], : sample.img_shape[1]] = False
        results.append((*(level[image] for level in maps), mask))
    return results


def compare_features(
    expected: Sequence[tuple[np.ndarray, ...]], found: Sequence[tuple[np.ndarray, ...]], tolerance: float
) -> FeatureAgreement:
    """Compare feature maps, and padding masks, which come last, of several inputs."""
    agreement = FeatureAgreement(tolerance)
    for (*maps, mask), (*others, other) in zip(expected, found, strict=True):
        same = [part.shape for part in (*maps, mask)] == [part.shape for part in (*others, other)]
        if not same or not np.array_equal(mask, other):
            agreement.masks_differ = True
            continue
        for first, second in zip(maps, others, strict=True):
            difference = float(np.abs(first - second).max())
            agreement.maps += 1
            agreement.difference = max(agreement.difference, difference)
            agreement.relative = max(agreement.relative, difference / max(float(np.abs(first).max()), 1e-12))
            agreement.masks_differ |= not np.isfinite(difference)
    return agreement


# ---- time -----------------------------------------------------------------------------------------------------------
def median_time(run: Callable[[Sequence[np.ndarray]], object], batches: Sequence[Sequence[np.ndarray]]) -> float:
    """Median time of a batch in seconds, of at least three runs, in :data:`SECONDS`."""
    measured, start = [], time.perf_counter()
    while len(measured) < 3 or (time.perf_counter() - start < SECONDS and len(measured) < 50):
        batch = batches[len(measured) % len(batches)]
        before = time.perf_counter()
        run(batch)
        measured.append(time.perf_counter() - before)
    return statistics.median(measured)


# ---- average precision ----------------------------------------------------------------------------------------------
class LabeledImages:
    """Images with ground truth from a COCO annotation file.

    Args:
        annotations: The file.
        folder: Folder of the images; None: that of the file.
        class_names: Class names of the detector.
        limit: Maximum number of images; None: all.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the file is no COCO annotation file, or has none of the classes.
    """

    def __init__(
        self,
        annotations: str | os.PathLike,
        folder: str | os.PathLike | None,
        class_names: Sequence[str],
        limit: int | None = None,
    ) -> None:
        path = Path(annotations)
        if not path.is_file():
            raise FileNotFoundError(f'the annotation file {path} does not exist; give a COCO JSON file')
        try:
            content = json.loads(path.read_text())
            images = content['images'][:limit]
            ids = {category['name']: category['id'] for category in content['categories']}
            objects = content['annotations']
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is not a COCO annotation file ({error!r})') from None
        if not ids.keys() & set(class_names):
            raise ValueError(
                f'{path} has the classes {", ".join(list(ids)[:5])}, and the detector {", ".join(class_names[:5])}; '
                'choose the data that it was trained for'
            )
        self.ids = [ids.get(name) for name in class_names]
        folder = Path(folder or path.parent)
        self.files = {image['id']: folder / image['file_name'] for image in images}
        kept = [item for item in objects if item['image_id'] in self.files]
        self.truth = dict(images=images, categories=content['categories'], annotations=kept)

    def average_precision(self, detect: Callable[[np.ndarray], Detections]) -> float:
        """AP (COCO's, 0.50:0.95) of a function that returns the detections in an image."""
        from contextlib import redirect_stdout
        from io import StringIO

        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        results = []
        for image_id, path in self.files.items():
            for (x1, y1, x2, y2), score, label in zip(*detect(read_image(path))[:3], strict=True):
                category = self.ids[label]
                if category is not None:
                    box = [float(value) for value in (x1, y1, x2 - x1, y2 - y1)]
                    results.append(dict(image_id=image_id, category_id=category, bbox=box, score=float(score)))
        with redirect_stdout(StringIO()):
            truth = COCO()
            truth.dataset = self.truth
            truth.createIndex()
            if not results or not self.truth['annotations']:
                return 0.0
            evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(evaluation.stats[0])

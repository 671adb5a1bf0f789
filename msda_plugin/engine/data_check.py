"""Checks the data of a config before training starts, without reading images. Every error says how to fix it.

Without these checks, bad data ends in an error inside a worker process, or in an AP of 0 without any error (MMDetection
silently drops classes that are not in the annotation file).
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.fileio import join_path
from mmengine.logging import print_log

from msda_plugin.engine.config_walk import walk
from msda_plugin.engine.messages import counted, listed
from msda_plugin.safe_loading import load_json

REQUIRED = dict(  # fields of each record that MMDetection's CocoDataset reads
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
EVALUATED = ('iscrowd',)  # fields of each annotation that pycocotools also reads in an evaluation
MOST_PIXELS = 1e9  # of a side or a coordinate; larger values overflow in computations


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _is_pixels(value: object) -> bool:
    return _is_number(value) and abs(value) <= MOST_PIXELS


_ID = (lambda value: isinstance(value, str) or _is_number(value), 'a number or a string')
_PIXELS = (_is_pixels, 'a number of pixels')
KINDS = dict(  # field: (check, description for the error)
    id=_ID,
    image_id=_ID,
    category_id=_ID,
    name=_ID,
    width=_PIXELS,
    height=_PIXELS,
    area=(_is_number, 'a finite number'),
    iscrowd=(lambda value: value in (0, 1), '0 or 1'),
    file_name=(lambda value: isinstance(value, str) and '\0' not in value, 'a string'),
)


@dataclass(frozen=True)
class DataReport:
    """Contents of an annotation file.

    Attributes:
        ann_file: The annotation file.
        classes: Names of the classes in use, in the order of their labels.
        num_images: Number of images.
        num_boxes: Number of boxes of these classes, including crowds.
        num_empty_images: Number of images without such a box.
        num_degenerate_boxes: Number of boxes that MMDetection drops: a side under one pixel, or outside their image.
        warnings: Sentences about likely mistakes that do not stop the training.
    """

    ann_file: str
    classes: tuple[str, ...]
    num_images: int
    num_boxes: int
    num_empty_images: int
    num_degenerate_boxes: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f'{self.ann_file}: {counted(self.num_images, "image")} ({self.num_empty_images} of them empty), '
            f'{counted(self.num_boxes, "box", "boxes")} of {counted(len(self.classes), "class", "classes")}'
        )


def check_coco(
    ann_file: str | os.PathLike,
    img_root: str | os.PathLike,
    classes: Sequence[str] | None = None,
    *,
    evaluated: bool = False,
    annotated: bool = True,
) -> DataReport:
    """Check an annotation file in COCO format, and that its images exist. Images are not opened.

    Args:
        ann_file: JSON file.
        img_root: Folder that its file names are relative to.
        classes: Classes to use; None: all classes of the file.
        evaluated: Whether predictions are compared with its boxes, for which each needs ``iscrowd``.
        annotated: If False, the list of annotations may be missing, as in the files of a test server.

    Raises:
        FileNotFoundError: If the annotation file, the image folder or images do not exist.
        ValueError: If the file is not JSON, is not COCO, has no image, or lacks classes.
    """
    ann_file, img_root = str(ann_file), str(img_root)
    content = read_coco(ann_file, annotated=annotated)
    for field, keys in REQUIRED.items():
        check_records(
            ann_file, field, content[field], (*keys, *EVALUATED) if evaluated and field == 'annotations' else keys
        )
    if not content['images']:
        raise ValueError(f"the annotation file '{ann_file}' lists no images; is it the file of another split?")

    present = [category['name'] for category in content['categories']]
    classes = _check_classes(ann_file, present, classes)
    used = {category['id'] for category in content['categories'] if category['name'] in set(classes)}
    annotations = [a for a in content['annotations'] if a['category_id'] in used]
    known = {category['id'] for category in content['categories']}
    unknown = [a['category_id'] for a in content['annotations'] if a['category_id'] not in known]
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    strays = sum(a['image_id'] not in sizes for a in annotations)
    annotations = [a for a in annotations if a['image_id'] in sizes]
    check_boxes(ann_file, content['annotations'])  # MMDetection reads those of other classes as well
    degenerate = find_degenerate(annotations, sizes)
    _check_images(ann_file, img_root, content['images'])

    warnings = []
    # CocoDataset numbers the classes in the order of the file, and names them in the order of the config.
    in_file_order = tuple(name for name in present if name in set(classes))
    if in_file_order != classes:
        warnings.append(
            f"'{ann_file}' has the classes in the order {listed(in_file_order)}, the config in the order "
            f'{listed(classes)}; MMDetection goes by the file, so write them in that order, or names will '
            'be swapped'
        )
    if annotated and not annotations:
        warnings.append(f"'{ann_file}' holds no box of the classes {listed(classes)}")
    if degenerate:
        names = {image['id']: image['file_name'] for image in content['images']}
        warnings.append(
            f"{len(degenerate)} of the {counted(len(annotations), 'box', 'boxes')} in '{ann_file}' "
            f'{"is" if len(degenerate) == 1 else "are"} under a pixel wide or high, without area or outside the image, '
            f'and left out: {listed((described_box(a, names, reason) for a, reason in degenerate), limit=3)}'
        )
    if unknown:
        ids = listed(sorted(set(unknown), key=str), limit=5)
        warnings.append(
            f"{len(unknown)} of the {counted(len(content['annotations']), 'annotation')} in '{ann_file}' "
            f'{"has" if len(unknown) == 1 else "have"} a category that it does not list (id {ids}), and '
            f'{"is" if len(unknown) == 1 else "are"} left out'
        )
    if strays:
        belong = 'belongs to an image' if strays == 1 else 'belong to images'
        warnings.append(f"{counted(strays, 'annotation')} in '{ann_file}' {belong} that it does not list")
    return DataReport(
        ann_file,
        classes,
        len(sizes),
        len(annotations),
        len(sizes) - len({a['image_id'] for a in annotations}),
        len(degenerate),
        tuple(warnings),
    )


def check_config_data(cfg: Config, splits: Sequence[str] = ('train', 'val')) -> list[DataReport]:
    """Check the datasets of an MMDetection config, and that the head has their number of classes.

    Every ``CocoDataset`` in ``{split}_dataloader``, also inside wrappers (``RepeatDataset``, ``ConcatDataset``, …), is
    checked with `check_coco`; other datasets, and those on remote storage, are skipped. Warnings are logged.

    Raises:
        FileNotFoundError: If a data root, an annotation file (also of an evaluator), an image folder or images do not
            exist.
        ValueError: If an annotation file is not COCO or lacks classes, or the head has another number of classes.
    """
    reports = []
    for split in splits:
        for where, dataset in _coco_datasets(cfg.get(f'{split}_dataloader'), f'{split}_dataloader'):
            classes = _configured_classes(where, dataset)
            _check_head(cfg.get('model'), where, classes)
            if _is_remote(dataset):
                continue
            ann_file, img_root = _paths(where, dataset)
            metrics = _metrics(cfg.get(f'{split}_evaluator'))
            compared = [metric for metric in metrics if not metric.get('format_only')]
            reports.append(
                check_coco(
                    ann_file,
                    img_root,
                    classes,
                    annotated=bool(compared) or split != 'test',
                    evaluated=any(str(metric.get('type')).endswith('CocoMetric') for metric in compared),
                )
            )
        _check_evaluator(cfg.get(f'{split}_evaluator'), f'{split}_evaluator')
    for report in reports:
        for warning in report.warnings:
            print_log(warning, logger='current', level=logging.WARNING)
    return reports


# ---- an annotation file ---------------------------------------------------------------------------------------------
def read_coco(ann_file: str | os.PathLike, *, annotated: bool = True) -> dict:
    """Read an annotation file: a dict with the lists ``images``, ``annotations`` and ``categories``.

    Args:
        ann_file: JSON file.
        annotated: If False, ``annotations`` may be missing, and becomes an empty list.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not JSON, not COCO, or too large for the free memory.
    """
    if not Path(ann_file).is_file():
        raise FileNotFoundError(
            f"the annotation file '{ann_file}' does not exist; set data_root and ann_file of the dataset in the config"
        )
    try:
        content = load_json(ann_file, 'COCO')
    except ValueError as error:
        raise ValueError(f'the annotation file {error}') from None
    if isinstance(content, dict) and not annotated:
        content.setdefault('annotations', [])
    missing = [key for key in REQUIRED if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        found = f'an object with the keys {listed(content)}' if isinstance(content, dict) else f'a {_kind(content)}'
        raise ValueError(
            f"the annotation file '{ann_file}' is not COCO: it needs the lists {listed(missing)}, and is "
            f'{found}; convert it, or use the dataset class for its format'
        )
    return content


def check_records(ann_file: str | os.PathLike, field: str, records: list, keys: Sequence[str]) -> None:
    """Check that every record of ``field`` has these keys, with valid values, and that ids are unique.

    Raises:
        ValueError: If a key is missing, a value is invalid, or an id occurs twice.
    """
    wanted = set(keys)
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not wanted <= record.keys():
            lacking = [key for key in keys if not isinstance(record, dict) or key not in record]
            raise ValueError(f"the annotation file '{ann_file}' is not COCO: {field}[{index}] lacks {listed(lacking)}")
        for key, (fits, kind) in KINDS.items():
            if key in record and not fits(record[key]):
                raise ValueError(
                    f"the annotation file '{ann_file}' is not COCO: {key} of {field}[{index}] must be "
                    f'{kind}, got {_shortened(record[key])}'
                )
    if 'id' in wanted and len({record['id'] for record in records}) < len(records):
        raise ValueError(
            f"the annotation file '{ann_file}' is not COCO: the ids of its {field} are not unique; renumber them"
        )


def _check_classes(ann_file: str, present: list[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None:
        return tuple(present)
    lacking = [name for name in classes if name not in set(present)]
    if lacking:
        raise ValueError(
            f"the annotation file '{ann_file}' does not have the classes {listed(lacking)} of the config; "
            f'it has {listed(present)}, the config {listed(classes)}; set metainfo=dict(classes=(…,)) of '
            'the dataset and num_classes of the model'
        )
    return tuple(classes)


def check_boxes(ann_file: str | os.PathLike, annotations: list[dict]) -> None:
    """Check that the bbox of every annotation is a list of four numbers, in pixels.

    Raises:
        ValueError: If a bbox is something else.
    """
    for annotation in annotations:
        box = annotation['bbox']
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_pixels, box)):
            raise ValueError(
                f"the annotation file '{ann_file}' is not COCO: the bbox of the annotation with id "
                f'{annotation.get("id")} must be [x, y, width, height], got {_shortened(box)}'
            )


def find_degenerate(annotations: list[dict], sizes: dict[object, tuple[float, float]]) -> list[tuple[dict, str]]:
    """The annotations whose boxes MMDetection drops, each with the reason; NaN boxes included.

    Args:
        annotations: With ``bbox`` and ``area``.
        sizes: (width, height) in pixels by image id.
    """
    if not annotations:
        return []
    x, y, w, h = np.array([a['bbox'] for a in annotations], float).T
    width, height = np.array([sizes[a['image_id']] for a in annotations], float).T
    area = np.array([a['area'] for a in annotations], float)
    reasons = {  # the first one that applies is given
        'not a number': np.isnan(x + y + w + h),
        'no width or height': (w <= 0) | (h <= 0),
        'under one pixel': (w < 1) | (h < 1),
        'outside the image': (np.minimum(x + w, width) <= np.maximum(x, 0))
        | (np.minimum(y + h, height) <= np.maximum(y, 0)),
        'no area': ~(area > 0),
    }
    found = np.stack(list(reasons.values()))
    names = list(reasons)
    return [(annotations[index], names[found[:, index].argmax()]) for index in np.flatnonzero(found.any(axis=0))]


def described_box(annotation: dict, names: dict[object, str], reason: str) -> str:
    """'0.jpg annotation 5 [4, 4, 0, 9] (no width or height)'; ``names``: file names by image id."""
    box = ', '.join(f'{float(value):g}' for value in annotation['bbox'])
    return f'{names[annotation["image_id"]]} annotation {annotation.get("id")} [{box}] ({reason})'


def _check_images(ann_file: str, img_root: str, images: list[dict]) -> None:
    if not Path(img_root or '.').is_dir():
        raise FileNotFoundError(
            f"the image folder '{img_root}' does not exist; set data_root and data_prefix=dict(img="
            '…) of the dataset in the config'
        )
    folders: dict[str, set[str]] = {}  # each is listed once, which is much faster than one stat per file
    missing = []
    for image in images:
        folder, name = os.path.split(os.path.join(img_root, image['file_name']))
        if folder not in folders:
            folders[folder] = set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else set()
        if name not in folders[folder]:
            missing.append(image['file_name'])
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {counted(len(images), 'image')} of '{ann_file}' "
            f"{'is' if len(missing) == 1 else 'are'} not in '{img_root}': "
            f'{listed(missing, limit=5)}; set data_prefix=dict(img=…) to the folder of the images'
        )


def _shortened(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f'{text[:limit]}…'


def _kind(content: object) -> str:
    return {list: 'list', str: 'string'}.get(type(content), 'single value')


# ---- a config -------------------------------------------------------------------------------------------------------
def _coco_datasets(dataloader: object, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """(path in the config, dataset) of each ``CocoDataset`` in a dataloader, also inside of wrappers."""
    for path, node in walk(dataloader, where):
        if isinstance(node, dict) and re.search(r'\.(dataset|datasets\.\d+)$', path) and _is_coco(node.get('type')):
            yield path, node


def _dataset_class(kind: object) -> object:
    from mmdet.registry import DATASETS  # imported here because checking a single file does not need MMDetection

    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _is_coco(kind: object) -> bool:
    """Whether the class is a ``CocoDataset`` that reads COCO files (those of LVIS or panoptic data do not)."""
    from mmdet.datasets import CocoDataset

    found = _dataset_class(kind)
    return (
        isinstance(found, type)
        and issubclass(found, CocoDataset)
        and all(getattr(found, name) is getattr(CocoDataset, name) for name in ('load_data_list', 'parse_data_info'))
    )


def _is_remote(dataset: dict) -> bool:
    return bool(dataset.get('backend_args')) or any(
        '://' in str(path) for path in (dataset.get('data_root'), dataset.get('ann_file'))
    )


def _paths(where: str, dataset: dict) -> tuple[str, str]:
    """Annotation file and image folder, joined as in MMEngine's ``BaseDataset``."""
    root = dataset.get('data_root') or ''
    if root and not Path(root).is_dir():
        raise FileNotFoundError(
            f"the data root '{root}' of {where} does not exist (seen from {Path.cwd()}); put or "
            'link the data there, or name its folder with --cfg-options data_root=DIR'
        )
    if not dataset.get('ann_file'):
        raise ValueError(f'{where} has no ann_file; give it the annotation file in COCO format')
    prefix = dataset.get('data_prefix') or {}
    if 'img' not in prefix:
        raise ValueError(f"{where}.data_prefix has no 'img'; write data_prefix=dict(img='FOLDER/')")
    ann_file, img_root = (
        path if os.path.isabs(path) or not root else join_path(root, path)
        for path in (dataset['ann_file'], prefix['img'])
    )
    return ann_file, img_root


def _configured_classes(where: str, dataset: dict) -> tuple[str, ...]:
    """The classes of the config, or of the dataset class if the config has none."""
    default = _dataset_class(dataset['type']).METAINFO.get('classes', ())
    classes = (dataset.get('metainfo') or {}).get('classes', default)
    if isinstance(classes, str):
        if not Path(classes).is_file():
            if os.path.splitext(classes)[1] or os.sep in classes:
                raise FileNotFoundError(
                    f"the class list '{classes}' of {where}.metainfo does not exist (seen from "
                    f'{Path.cwd()}); put it there, a name a line, or write the names: '
                    'metainfo=dict(classes=(…,))'
                )
            raise ValueError(
                f"{where}.metainfo.classes is the string '{classes}'; a tuple of one class needs a comma: "
                f"('{classes}',)"
            )
        classes = Path(classes).read_text().split('\n')
    return tuple(name for name in classes if name)


def bbox_heads(model: object) -> Iterator[tuple[str, dict]]:
    """(path in the config, head) of every ``bbox_head``, which can be one head or a list."""
    for path, node in walk(model, 'model'):
        if isinstance(node, dict) and re.search(r'\.bbox_head(\.\d+)?$', path):
            yield path, node


def _check_head(model: object, where: str, classes: tuple[str, ...]) -> None:
    for path, head in bbox_heads(model):
        number = head.get('num_classes')
        if number is not None and number != len(classes):
            raise ValueError(
                f'{path}.num_classes is {number}, but {where} has {len(classes)} classes '
                f'({listed(classes)}); set {path}.num_classes={len(classes)}, or metainfo=dict(classes='
                '(…,)) of the dataset'
            )


def _metrics(evaluator: object) -> list[dict]:
    return [
        metric
        for metric in (evaluator if isinstance(evaluator, (list, tuple)) else [evaluator])
        if isinstance(metric, dict)
    ]


def _check_evaluator(evaluator: object, where: str) -> None:
    for metric in _metrics(evaluator):
        path = None if metric.get('backend_args') else metric.get('ann_file')
        if path and '://' not in path and not Path(path).is_file():
            raise FileNotFoundError(
                f"the annotation file '{path}' of {where} does not exist; it is usually that of the dataset"
            )

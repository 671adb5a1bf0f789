"""Custom data in YOLO format: ``data.yaml`` and a text file of labels for each image, by the rules of Ultralytics.

``data.yaml`` has ``train``, ``val`` and ``test``: a folder of images, a text file that lists images, or several of
these, relative to ``path``; and ``names``, a list or a dict. The labels of ``…/images/a/1.jpg`` are in
``…/labels/a/1.txt``, otherwise next to the image. A row is ``class x y width height``, the center and size as fractions
of the image, or ``class x1 y1 x2 y2 x3 y3 …``, a polygon, whose bounding box is used. An image with an empty label
file, or without one, has no objects.

Source: https://docs.ultralytics.com/datasets/detect/
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from msda_plugin.engine.messages import counted, listed
from msda_plugin.tools.custom_data.coco import IMAGE_SUFFIXES, Split

KEYS = dict(train=('train',), val=('val', 'valid', 'validation'), test=('test',))
TOLERANCE = 0.01  # of coordinates beyond the image


def find(folder: Path) -> list[Path]:
    """The YAML files of YOLO data in a folder and its subfolders, one level deep."""
    paths = [path for pattern in ('*.y*ml', '*/*.y*ml') for path in sorted(folder.glob(pattern))]
    return [path for path in paths if _is_config(path)]


def find_labels(folder: Path) -> Path | None:
    """A label file in a folder ``labels``, which hints at YOLO data that lack their YAML file."""
    return next((path for pattern in ('labels', '*/labels') for path in folder.glob(f'{pattern}/**/*.txt')), None)


def _is_config(path: Path) -> bool:
    try:
        content = _read(path)
    except ValueError:
        return path.stem == 'data'  # whose error is worth reading
    return 'train' in content and ('names' in content or 'nc' in content)


def _read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is not valid YAML: {" ".join(str(error).split())}') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path} must have the keys train, val and names, but is a {type(content).__name__}')
    return content


def load(config: Path) -> list[Split]:
    """Read the splits of YOLO data: 'train', and 'val' and 'test' if there are any.

    Args:
        config: The YAML file.

    Returns:
        Splits with ``normalized`` boxes. Missing images are among them, and are found by `clean`.

    Raises:
        FileNotFoundError: If the YAML file, or the folder or list of images of 'train' or 'val', does not exist.
        ValueError: If the YAML file is incomplete, rows of labels are wrong, or no image of a split has labels.
    """
    if not config.is_file():
        raise FileNotFoundError(f'--data {config} does not exist; give a folder or an annotation file')
    content = _read(config)
    names = _names(config, content)
    splits: list[Split] = []
    left_out = []
    for name, keys in KEYS.items():
        key = next((key for key in keys if content.get(key)), None)
        if key is None:
            continue
        try:
            images, notes = _images(config, content, key)
            splits.append(_split(name, config, images, names, content.get('kpt_shape')))
            splits[-1].notes += notes
        except (FileNotFoundError, _NoLabels) as error:
            if name != 'test':
                raise
            left_out.append(f'test data left out: {error}')
    if not splits or splits[0].name != 'train':
        raise ValueError(f'{config} has no entry train; give it the folder or list of the training images')
    splits[0].notes += left_out
    return splits


class _NoLabels(ValueError):
    pass


def _names(config: Path, content: dict) -> list[str]:
    names, number = content.get('names'), content.get('nc')
    if names is None and isinstance(number, int):
        names = [f'class_{index}' for index in range(number)]
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise ValueError(f'the names of {config} must be numbered from 0 to {len(names) - 1}, got {listed(names)}')
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or any(isinstance(name, (dict, list)) for name in names):
        raise ValueError(f'{config} needs names, a list of class names or a dict such as {{0: cat, 1: dog}}')
    if number is not None and number != len(names):
        raise ValueError(f'{config} has nc: {number}, but {counted(len(names), "name")}; correct one of them')
    return [str(name) for name in names]


# ---- images ---------------------------------------------------------------------------------------------------------
def _images(config: Path, content: dict, key: str) -> tuple[list[Path], list[str]]:
    """The images of an entry, each once; and notes."""
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    images, notes = [], []
    for entry in map(str, entries):
        place, note = _find_place(config, content, key, entry)
        notes += note
        images += _in_folder(place) if place.is_dir() else _in_list(place)
    if not images:
        raise ValueError(f'{key} of {config}, {listed(entries)}, has no images; name a folder or list with images')
    return list(dict.fromkeys(images)), notes


def _find_place(config: Path, content: dict, key: str, entry: str) -> tuple[Path, list[str]]:
    """The folder or list that an entry names; and a note if the data is elsewhere than ``path`` says."""
    own, declared = config.parent, content.get('path')
    bases = [own] if not declared else [own / Path(str(declared)).expanduser(), Path(str(declared)).expanduser(), own]
    # Roboflow writes ../train/images for a folder next to the YAML file, which Ultralytics finds like this.
    tried = [base / part for base in bases for part in dict.fromkeys((entry, entry.removeprefix('../')))]
    tried = [Path(os.path.abspath(path)) for path in tried]
    found = next((path for path in tried if os.path.exists(path)), None)  # unlike Path.exists, of any string
    if found is None:
        raise FileNotFoundError(
            f'{key} of {config} is {entry}, but there is no {" or ".join(dict.fromkeys(map(str, tried)))}; correct '
            f'{key} or path'
        )
    elsewhere = declared and not any(os.path.exists(base / entry) for base in bases[:2])
    return found, [f'{declared}, the path in {config.name}, has no {entry}; {found} is used'] if elsewhere else []


def _in_folder(folder: Path) -> list[Path]:
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')
    )


def _in_list(path: Path) -> list[Path]:
    """The images that a text file lists, one a line, relative to the file or to the working directory."""
    if path.suffix.lower() != '.txt':
        raise ValueError(f'{path} must be a folder of images, or a .txt file that lists images')
    lines = [line.strip() for line in path.read_text(encoding='utf-8', errors='replace').splitlines()]
    images = []
    for line in filter(None, lines):
        places = [Path(os.path.abspath(base / line)) for base in (path.parent, Path())]
        images.append(next((place for place in places if os.path.isfile(place)), places[0]))
    return images


# ---- labels ---------------------------------------------------------------------------------------------------------
def _label_file(image: Path) -> Path:
    """The label file of an image: its last folder ``images`` becomes ``labels``."""
    *folders, name = image.parts
    if 'images' in folders[1:]:
        folders[len(folders) - 1 - folders[::-1].index('images')] = 'labels'
    return Path(*folders, name).with_suffix('.txt')


def _split(name: str, config: Path, images: list[Path], names: Sequence[str], keypoints: object) -> Split:
    root = Path(os.path.commonpath([image.parent for image in images]))
    records, annotations, problems = [], [], []
    without, repeated = 0, 0
    for number, image in enumerate(images, 1):
        records.append(dict(id=number, file_name=image.relative_to(root).as_posix()))
        path = _label_file(image)
        if not os.path.isfile(path):
            without += 1
            continue
        rows, wrong = _rows(path, len(names), keypoints)
        problems += wrong
        once = list(dict.fromkeys(rows))
        repeated += len(rows) - len(once)
        annotations += [
            dict(id=len(annotations) + index, image_id=number, category_id=label + 1, bbox=list(box), iscrowd=0)
            for index, (label, box) in enumerate(once, 1)
        ]
    if problems:
        raise ValueError(
            f'{counted(len(problems), "row")} of YOLO labels {"is" if len(problems) == 1 else "are"} wrong: '
            f'{"; ".join(problems[:5])}{f"; and {len(problems) - 5} more" if len(problems) > 5 else ""}'
        )
    if without == len(images):
        raise _NoLabels(
            f'no image of {name} in {config} has labels; {images[0]} should have them in {_label_file(images[0])}'
        )
    notes = []
    if without:
        notes.append(f'{counted(without, "image")} without a label file, used as images without objects')
    if repeated:
        notes.append(f'{counted(repeated, "repeated row")} of labels left out')
    categories = [dict(id=index, name=each) for index, each in enumerate(names, 1)]
    content = dict(images=records, annotations=annotations, categories=categories)
    return Split(name, config.absolute(), root, content, notes, changed=True, normalized=True)


def _rows(path: Path, num_classes: int, keypoints: object) -> tuple[list[tuple[int, tuple]], list[str]]:
    """(class, normalized box as x, y, width, height) of each row; and a sentence on each wrong row."""
    rows, problems = [], []
    extra = math.prod(keypoints) if isinstance(keypoints, (list, tuple)) else 0  # numbers after the box
    for number, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
        tokens = line.split()
        if not tokens:
            continue
        try:
            label, *values = map(float, tokens)
        except ValueError:
            problems.append(f'{path}, line {number}, is not made of numbers')
            continue
        if extra and len(values) == 4 + extra:
            values = values[:4]
        beyond = [value for value in values if value < -TOLERANCE or value > 1 + TOLERANCE]
        if not (len(values) == 4 or not extra and len(values) >= 6 and len(values) % 2 == 0):
            problems.append(
                f'{path}, line {number}, has {counted(len(tokens), "number")}, expected {5 + extra}: class, x, y, '
                f'width and height{", and the keypoints" if extra else "; or class and at least 3 points of a polygon"}'
            )
        elif label not in range(num_classes):
            problems.append(f'{path}, line {number}, has the class {tokens[0]}, expected 0 to {num_classes - 1}')
        elif beyond:
            problems.append(
                f'{path}, line {number}, has the coordinate {beyond[0]:g}, expected 0 to 1, a fraction of the image'
            )
        elif len(values) == 4:
            x, y, width, height = values
            rows.append((int(label), (x - width / 2, y - height / 2, width, height)))
        else:
            x, y = values[::2], values[1::2]
            rows.append((int(label), (min(x), min(y), max(x) - min(x), max(y) - min(y))))
    return rows, problems

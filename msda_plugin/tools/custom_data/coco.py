"""Custom data in COCO format: find its files, check every record and image, and fix what can be fixed.

Supported layouts, with images anywhere below the folder::

    DIR/train.json, val.json, images/                                 one folder of images
    DIR/annotations/instances_train2017.json, train2017/, …           COCO
    DIR/train/_annotations.coco.json, DIR/valid/_annotations.coco.json   Roboflow
    DIR/annotations.json                                              one file, of which a part is for validation
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

from msda_plugin.engine.data_check import check_boxes, check_records, count_degenerate, read_coco
from msda_plugin.engine.messages import listed
from msda_plugin.files import atomic_write

WORDS = dict(
    train='train',
    training='train',
    trainval='train',
    val='val',
    valid='val',
    validation='val',
    dev='val',
    test='test',
    testing='test',
)
SPLITS = dict(train='training', val='validation', test='test')
DEPTH = 3  # levels of subfolders that are searched for images
NEEDED = dict(images=('id', 'file_name'), annotations=('image_id', 'category_id', 'bbox'), categories=('id', 'name'))


@dataclass
class Split:
    """One annotation file with its images.

    Attributes:
        name: 'train', 'val' or 'test'.
        ann_file: The user's annotation file.
        images: Folder that the file names are relative to.
        content: Content of the file, which `clean` converts for training and evaluation.
        notes: Findings and changes, a sentence each.
        changed: Whether ``content`` differs from the file.
        bad_images: File names of missing or unreadable images.
    """

    name: str
    ann_file: Path
    images: Path
    content: dict
    notes: list[str] = field(default_factory=list)
    changed: bool = False
    bad_images: list[str] = field(default_factory=list)

    @property
    def most_boxes(self) -> int:
        """Maximum number of boxes per image."""
        return max(Counter(a['image_id'] for a in self.content['annotations']).values(), default=0)


# ---- finding the files ----------------------------------------------------------------------------------------------
def find_annotations(data: str | os.PathLike, val: str | os.PathLike | None = None) -> dict[str, Path]:
    """Find the annotation files of the splits 'train' (always), 'val' and 'test' by their names.

    Args:
        data: A folder, or the annotation file for training.
        val: The annotation file for validation; None: the one next to ``data``, if there is one.

    Raises:
        FileNotFoundError: If ``data`` or ``val`` does not exist, or the folder contains no annotation file.
        ValueError: If there are several candidates for training or for validation.
    """
    data = Path(data)
    if val is not None and not Path(val).is_file():
        raise FileNotFoundError(
            f'--val {val} does not exist; give the annotation file for validation (JSON in COCO format)'
        )
    if data.is_file():
        siblings = {
            split: [
                path
                for path in data.parent.iterdir()
                if path.suffix == '.json'
                and path != data
                and _split_of(path) == split
                and _without_split(path) == _without_split(data)
            ]
            for split in ('val', 'test')
            if _split_of(data) == 'train'
        }
        found = {'train': data, **{split: paths[0] for split, paths in siblings.items() if len(paths) == 1}}
    elif data.is_dir():
        found = _find_in_folder(data, need_val=val is None)
    else:
        raise FileNotFoundError(
            f'--data {data} does not exist; give a folder or an annotation file (JSON in COCO format)'
        )
    return {**found, 'val': Path(val)} if val is not None else found


def _find_in_folder(folder: Path, need_val: bool) -> dict[str, Path]:
    files = sorted(path for pattern in ('*.json', '*/*.json') for path in folder.glob(pattern))
    named: dict[str, list[Path]] = {split: [] for split in SPLITS}
    unnamed = []
    for path in files:
        split = _split_of(path) or (_split_of(path.parent) if path.parent != folder else None)
        (unnamed if split is None else named[split]).append(path)
    named['train'] = named['train'] or [path for path in unnamed if _is_coco(path)]
    found = {}
    for split, paths in named.items():
        # The COCO data set also has files with captions and keypoints.
        paths = [path for path in paths if 'instances' in path.stem] or paths
        if len(paths) > 1 or split == 'test':  # a test file may have no annotations
            paths = [path for path in paths if _is_coco(path)]
        if len(paths) > 1 and (split == 'train' or split == 'val' and need_val):
            raise ValueError(
                f'{folder} has several annotation files for {SPLITS[split]}: '
                f'{", ".join(str(path.relative_to(folder)) for path in paths)}; choose one with '
                f'{"--data" if split == "train" else "--val"} FILE'
            )
        if len(paths) == 1:
            found[split] = paths[0]
    if 'train' not in found:
        seen = f'JSON files: {", ".join(path.name for path in files[:5])}' if files else 'no JSON files'
        raise FileNotFoundError(
            f'no annotation file in COCO format was found in {folder} and its subfolders ({seen}); give it with '
            '--data FILE'
        )
    return found


def _split_of(path: Path) -> str | None:
    return next((WORDS[word] for word in re.findall('[a-z]+', path.stem.lower()) if word in WORDS), None)


def _without_split(path: Path) -> tuple[str, ...]:
    return tuple(word for word in re.findall('[a-z]+', path.stem.lower()) if word not in WORDS)


def _is_coco(path: Path) -> bool:
    try:
        read_coco(path)
    except ValueError:
        return False
    return True


def find_images(ann_file: Path, content: dict, root: Path) -> Path:
    """Find the folder that the file names of an annotation file are relative to, by a sample of its images.

    Args:
        ann_file: The annotation file; its folder is tried first.
        content: Its content.
        root: Folder to search, with its subfolders.

    Raises:
        FileNotFoundError: If no folder contains any image of the sample.
    """
    names = [image['file_name'] for image in content['images']]
    sample = [names[index] for index in np.linspace(0, len(names) - 1, min(20, len(names))).astype(int)]
    folders = [ann_file.parent, root, *_folders(root, DEPTH)]
    # Folders of the same split come first: other splits may use the same file names.
    split = _split_of(ann_file) or _split_of(ann_file.parent)
    folders.sort(key=lambda folder: _split_of(folder) != split)
    # Unlike Path.is_file, os.path.isfile does not raise for a name that is too long.
    found = {folder: sum(os.path.isfile(folder / name) for name in sample) for folder in dict.fromkeys(folders)}
    best = max(found, key=found.get)
    if not found[best]:
        raise FileNotFoundError(
            f'none of the images of {ann_file} (such as {names[0]}) was found in {root} and its subfolders; give the '
            'folder that the file names are relative to with --images DIR'
        )
    return best


def _folders(root: Path, depth: int) -> list[Path]:
    with os.scandir(root) as entries:  # knows folders without a system call per file
        below = sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    return below + [folder for path in below if depth > 1 for folder in _folders(path, depth - 1)]


def load_split(name: str, ann_file: Path, root: Path, images: Path | None = None) -> Split:
    """Read one annotation file and find its images.

    Args:
        name: 'train', 'val' or 'test'.
        ann_file: JSON file in COCO format.
        root: Folder to search for its images, with its subfolders.
        images: Folder that its file names are relative to; None: found by `find_images`.

    Raises:
        FileNotFoundError: If the file or all of its images are missing.
        ValueError: If the file is not in COCO format or lists no images.
    """
    content = read_coco(ann_file)
    for part, keys in NEEDED.items():
        check_records(ann_file, part, content[part], keys)
    if not content['images']:
        raise ValueError(f"the annotation file '{ann_file}' lists no images; give another file")
    check_boxes(ann_file, content['annotations'])
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f'--images {images} does not exist; give the folder of the file names')
    return Split(name, Path(ann_file).absolute(), (images or find_images(ann_file, content, root)).absolute(), content)


# ---- classes --------------------------------------------------------------------------------------------------------
def choose_classes(train: Split, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes, in the order of the training file; a note lists the categories that are left out.

    Args:
        train: The training data.
        wanted: Names to use; None: the categories with at least one training box.

    Raises:
        ValueError: If a wanted class is not in the training data, two categories have the same name, or no box is left.
    """
    names = [str(category['name']) for category in train.content['categories']]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"{train.ann_file} has several categories named '{twice[0]}'; give them different names")
    lacking = [name for name in wanted or () if name not in names]
    if lacking:
        raise ValueError(
            f'--classes contains {", ".join(lacking)}, but the categories of {train.ann_file} are {", ".join(names)}'
        )
    boxes = count_boxes(train)
    classes = tuple(name for name in names if (name in wanted if wanted else boxes[name]))
    if not any(boxes[name] for name in classes):
        raise ValueError(
            f'{train.ann_file} has no box of the classes {", ".join(classes or names)}; add annotations, or choose '
            'other classes with --classes'
        )
    left_out = [name for name in names if name not in classes]
    if left_out:
        why = 'not in --classes' if wanted else 'no training boxes'
        train.notes.append(f'categories left out, {why}: {", ".join(left_out)}')
    return classes


def count_boxes(split: Split) -> Counter:
    """Number of boxes by class name."""
    names = {category['id']: str(category['name']) for category in split.content['categories']}
    return Counter(names[a['category_id']] for a in split.content['annotations'] if a['category_id'] in names)


# ---- records and images ---------------------------------------------------------------------------------------------
def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image in pixels, as read for training; None: it cannot be read."""
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # missing; empty
        return None
    return None if image is None else (image.shape[1], image.shape[0])


def clean(
    split: Split, classes: Sequence[str], *, skip_bad_images: bool = False, tick: Callable[[], object] = lambda: None
) -> None:
    """Read every image of a split and convert its content for training and evaluation, in place.

    The categories become ``classes``, in this order. Missing ``area``, ``iscrowd``, ``width`` and ``height`` are added.
    Annotations of other categories or unlisted images are dropped; duplicate annotation ids are replaced. Boxes are not
    changed.

    Args:
        split: From `load_split`.
        classes: From `choose_classes`.
        skip_bad_images: Drop missing or unreadable images; otherwise they are only listed in ``bad_images``.
        tick: Called after each image.
    """
    content = split.content
    categories = content['categories']
    if [category['name'] for category in categories] != list(classes):
        categories = [dict(id=index, name=name) for index, name in enumerate(classes, 1)]
    ids = {category['name']: category['id'] for category in categories}
    number = {category['id']: ids.get(str(category['name'])) for category in content['categories']}
    images, annotations = content['images'], content['annotations']

    sizes = {}
    paths = [split.images / image['file_name'] for image in images]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:  # OpenCV releases the GIL
        for image, size in zip(images, pool.map(image_size, paths), strict=True):
            sizes[image['id']] = size
            tick()
    split.bad_images = [image['file_name'] for image in images if sizes[image['id']] is None]
    if split.bad_images and skip_bad_images:
        images = [image for image in images if sizes[image['id']] is not None]
        split.notes.append(
            f'{len(split.bad_images)} missing or unreadable images left out: {listed(split.bad_images, 5)}'
        )

    other_size = [
        image['file_name']
        for image in images
        if 'width' in image
        and 'height' in image
        and sizes[image['id']] not in (None, (image['width'], image['height']))
    ]
    if other_size:
        split.notes.append(
            f'{len(other_size)} images differ in size from the annotation file, so their boxes may be wrong: '
            f'{listed(other_size, 5)}'
        )
    images = [
        image
        if 'width' in image and 'height' in image
        else {**image, **dict(zip(('width', 'height'), sizes[image['id']] or (0, 0), strict=True))}
        for image in images
    ]

    left, every_id = {image['id'] for image in images}, {image['id'] for image in content['images']}
    strays = sum(a['image_id'] not in every_id for a in annotations)
    if strays:
        split.notes.append(f'{strays} annotations of unlisted images left out')
    unknown = sum(a['category_id'] not in number for a in annotations)
    if unknown:
        split.notes.append(f'{unknown} annotations of unlisted categories left out')
    kept = [
        {'area': a['bbox'][2] * a['bbox'][3], 'iscrowd': 0, **a, 'category_id': number[a['category_id']]}
        for a in annotations
        if a['image_id'] in left and number.get(a['category_id']) is not None
    ]
    if len({a.get('id') for a in kept}) < len(kept) or any(a.get('id') is None for a in kept):
        kept = [{**a, 'id': index} for index, a in enumerate(kept, 1)]

    cleaned = dict(content, images=images, annotations=kept, categories=categories)
    split.changed = split.changed or cleaned != content
    split.content = cleaned


def split_off(train: Split, part: float, seed: int) -> Split:
    """Move a part of the training images to a new validation split, which is returned.

    The choice depends only on the seed and the file names, so adding a few images hardly changes it.

    Raises:
        ValueError: If there are fewer than two images, or the part is not between 0 and 1.
    """
    if not 0 < part < 1:
        raise ValueError(f'--val-part must be between 0 and 1, such as 0.2, got {part}')
    images = train.content['images']
    if len(images) < 2:
        raise ValueError(
            f'{train.ann_file} has {len(images)} image, but training and validation need at least one each; add images'
        )
    order = sorted(images, key=lambda image: sha256(f'{seed}/{image["file_name"]}'.encode()).digest())
    taken = {image['id'] for image in order[: min(max(1, round(part * len(images))), len(images) - 1)]}

    def choose(content: dict, is_taken: bool) -> dict:
        return dict(
            content,
            images=[image for image in images if (image['id'] in taken) == is_taken],
            annotations=[a for a in content['annotations'] if (a['image_id'] in taken) == is_taken],
        )

    val = Split(
        'val',
        train.ann_file,
        train.images,
        choose(train.content, True),
        changed=True,
        bad_images=[
            image['file_name']
            for image in images
            if image['id'] in taken and image['file_name'] in set(train.bad_images)
        ],
        notes=[f'taken from the training data: {len(taken)} of {len(images)} images, seed {seed}'],
    )
    train.content, train.changed = choose(train.content, False), True
    return val


def write(split: Split, folder: Path) -> Path:
    """Write the content of a split to ``folder`` if it was changed; returns the annotation file to use."""
    path = split.ann_file
    if split.changed:
        folder.mkdir(parents=True, exist_ok=True)
        path = (folder / f'{split.name}.json').absolute()
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(split.content, separators=(',', ':')))
    return path


# ---- the summary ----------------------------------------------------------------------------------------------------
def describe(splits: Sequence[Split], classes: Sequence[str]) -> str:
    """A table with the numbers of images and boxes in the splits, and their notes."""
    rows = [
        ('', *(SPLITS[split.name] for split in splits)),
        ('images', *(len(split.content['images']) for split in splits)),
        (
            '  without a box',
            *(
                len(split.content['images']) - len({a['image_id'] for a in split.content['annotations']})
                for split in splits
            ),
        ),
        ('  missing or unreadable', *(len(split.bad_images) for split in splits)),
        ('boxes', *(len(split.content['annotations']) for split in splits)),
        ('  degenerate, not used', *(_degenerate(split) for split in splits)),
    ]
    counts = [count_boxes(split) for split in splits]
    rows += [(f'  {name}', *(count[name] for count in counts)) for name in classes[:20]]
    if len(classes) > 20:
        rows.append((f'  … {len(classes) - 20} more', *(sum(count[name] for name in classes[20:]) for count in counts)))
    first = max(len(row[0]) for row in rows)
    lines = ['  '.join([f'{row[0]:<{first}}', *(f'{cell:>10}' for cell in row[1:])]).rstrip() for row in rows]
    lines += ['', f'{len(classes)} class{"es" if len(classes) > 1 else ""}: {listed(classes)}']
    for split in splits:
        lines.append(f'{SPLITS[split.name]}: {split.ann_file}, images in {split.images}')
        lines += [f'  note: {note}' for note in split.notes]
        unseen = [name for name in classes if not count_boxes(split)[name]]
        if unseen:
            lines.append(f'  note: no box of {listed(unseen, 5)}')
    return '\n'.join(lines)


def _degenerate(split: Split) -> int:
    sizes = {image['id']: (image['width'], image['height']) for image in split.content['images']}
    return count_degenerate(split.content['annotations'], sizes)

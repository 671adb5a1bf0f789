"""A user's own data in COCO format: find its files, look at every record and image, and put right what can be.

The layouts that are understood, the images anywhere below the folder::

    DIR/train.json, val.json, images/                                 one folder of images
    DIR/annotations/instances_train2017.json, train2017/, …           COCO
    DIR/train/_annotations.coco.json, DIR/valid/_annotations.coco.json   Roboflow
    DIR/annotations.json                                              one file: a part is split off for validation
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
DEPTH = 3  # of the folders below the data in which images are looked for
NEEDED = dict(images=('id', 'file_name'), annotations=('image_id', 'category_id', 'bbox'), categories=('id', 'name'))


@dataclass
class Split:
    """One annotation file with its images, and what was found in it.

    Attributes:
        name: 'train', 'val' or 'test'.
        ann_file: The annotation file as it came.
        images: Folder that its file names start from.
        content: The content of the file; `clean` brings it into the form that training and evaluation read.
        notes: What was found and done, a sentence each.
        changed: Whether ``content`` is no longer what the file says.
        bad_images: File names of images that are missing or unreadable.
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
        """Of one image."""
        return max(Counter(a['image_id'] for a in self.content['annotations']).values(), default=0)


# ---- finding the files ----------------------------------------------------------------------------------------------
def find_annotations(data: str | os.PathLike, val: str | os.PathLike | None = None) -> dict[str, Path]:
    """Annotation files of the splits 'train', 'val' and 'test', by their names; 'train' is always there.

    Args:
        data: A folder, or the annotation file for training.
        val: The annotation file for validation; None: the one that lies beside, if there is one.

    Raises:
        FileNotFoundError: There is no such folder or file, or no annotation file in it.
        ValueError: Several files could be the one for training or for validation.
    """
    data = Path(data)
    if val is not None and not Path(val).is_file():
        raise FileNotFoundError(
            f'--val {val} does not exist; give the annotation file for validation (JSON in COCO format)'
        )
    if data.is_file():
        beside = {
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
        found = {'train': data, **{split: paths[0] for split, paths in beside.items() if len(paths) == 1}}
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
        # COCO's own folder has files of captions and keypoints beside those of the boxes.
        paths = [path for path in paths if 'instances' in path.stem] or paths
        if len(paths) > 1 or split == 'test':  # a test file may well be without annotations
            paths = [path for path in paths if _is_coco(path)]
        if len(paths) > 1 and (split == 'train' or split == 'val' and need_val):
            raise ValueError(
                f'{folder} has several annotation files for {SPLITS[split]}: '
                f'{", ".join(str(path.relative_to(folder)) for path in paths)}; name the one to use with '
                f'{"--data" if split == "train" else "--val"} FILE'
            )
        if len(paths) == 1:
            found[split] = paths[0]
    if 'train' not in found:
        seen = f'it has the JSON files {", ".join(path.name for path in files[:5])}' if files else 'it has no JSON file'
        raise FileNotFoundError(
            f'no annotation file in COCO format was found in {folder} and its folders ({seen}); '
            'name it with --data FILE'
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
    """The folder that the file names of an annotation file start from: the one where most of a sample of them lie.

    Args:
        ann_file: The annotation file; its own folder is tried first.
        content: Its content.
        root: Folder below which to look.

    Raises:
        FileNotFoundError: None of the sample lies in any of the folders.
    """
    names = [image['file_name'] for image in content['images']]
    sample = [names[index] for index in np.linspace(0, len(names) - 1, min(20, len(names))).astype(int)]
    folders = [ann_file.parent, root, *_folders(root, DEPTH)]
    # Folders of the same split first: other splits can use the same file names.
    split = _split_of(ann_file) or _split_of(ann_file.parent)
    folders.sort(key=lambda folder: _split_of(folder) != split)
    # os.path answers where pathlib raises: for a name that is too long.
    found = {folder: sum(os.path.isfile(folder / name) for name in sample) for folder in dict.fromkeys(folders)}
    best = max(found, key=found.get)
    if not found[best]:
        raise FileNotFoundError(
            f'none of the images of {ann_file} (such as {names[0]}) was found in {root} and its '
            'folders; name the folder that their names start from with --images DIR'
        )
    return best


def _folders(root: Path, depth: int) -> list[Path]:
    with os.scandir(root) as entries:  # which knows folders without asking for each of a hundred thousand images
        below = sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    return below + [folder for path in below if depth > 1 for folder in _folders(path, depth - 1)]


def load_split(name: str, ann_file: Path, root: Path, images: Path | None = None) -> Split:
    """Read one annotation file and find its images.

    Args:
        name: 'train', 'val' or 'test'.
        ann_file: JSON file in COCO format.
        root: Folder below which its images are looked for.
        images: Folder that its file names start from; None: found by `find_images`.

    Raises:
        FileNotFoundError: The file, or all of its images, are missing.
        ValueError: The file is not COCO, or lists no image.
    """
    content = read_coco(ann_file)
    for part, keys in NEEDED.items():
        check_records(ann_file, part, content[part], keys)
    if not content['images']:
        raise ValueError(f"the annotation file '{ann_file}' lists no images; is it the file of another split?")
    check_boxes(ann_file, content['annotations'])
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f'--images {images} does not exist; give the folder that the file names start from')
    return Split(name, Path(ann_file).absolute(), (images or find_images(ann_file, content, root)).absolute(), content)


# ---- classes --------------------------------------------------------------------------------------------------------
def choose_classes(train: Split, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes, in the order of the training file.

    Args:
        train: The training data.
        wanted: Names to use; None: the categories of which there is at least one box for training. Those that are left
            out are noted.

    Raises:
        ValueError: A wanted class is not in the training data, two categories have one name, or no box is left.
    """
    names = [str(category['name']) for category in train.content['categories']]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"{train.ann_file} has several categories named '{twice[0]}'; give each a name of its own")
    lacking = [name for name in wanted or () if name not in names]
    if lacking:
        raise ValueError(f'--classes names {", ".join(lacking)}, but {train.ann_file} has {", ".join(names)}')
    boxes = count_boxes(train)
    classes = tuple(name for name in names if (name in wanted if wanted else boxes[name]))
    if not any(boxes[name] for name in classes):
        raise ValueError(
            f'{train.ann_file} holds no box of the classes {", ".join(classes or names)}; nothing can be '
            'learned from it'
        )
    left_out = [name for name in names if name not in classes]
    if left_out:
        why = 'not named by --classes' if wanted else 'without a box for training'
        train.notes.append(f'categories left out, {why}: {", ".join(left_out)}')
    return classes


def count_boxes(split: Split) -> Counter:
    """Number of boxes by class name."""
    names = {category['id']: str(category['name']) for category in split.content['categories']}
    return Counter(names[a['category_id']] for a in split.content['annotations'] if a['category_id'] in names)


# ---- records and images ---------------------------------------------------------------------------------------------
def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image as training reads it, in pixels; None: it cannot be read."""
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):  # missing; empty
        return None
    return None if image is None else (image.shape[1], image.shape[0])


def clean(
    split: Split, classes: Sequence[str], *, skip_bad_images: bool = False, tick: Callable[[], object] = lambda: None
) -> None:
    """Read every image of a split, and bring its content into the form that training and evaluation read, in place.

    The categories become ``classes``, in their order. Missing ``area``,
    ``iscrowd``, ``width`` and ``height`` are filled in, annotations numbered anew where two share a number, those of
    other categories or of no image left out. Boxes stay as they are.

    Args:
        split: From `load_split`.
        classes: From `choose_classes`.
        skip_bad_images: Leave out images that are missing or unreadable; else they are listed in ``bad_images``, and
            it is for the caller to stop.
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
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:  # OpenCV decodes without Python's lock
        for image, size in zip(images, pool.map(image_size, paths), strict=True):
            sizes[image['id']] = size
            tick()
    split.bad_images = [image['file_name'] for image in images if sizes[image['id']] is None]
    if split.bad_images and skip_bad_images:
        images = [image for image in images if sizes[image['id']] is not None]
        split.notes.append(
            f'{len(split.bad_images)} images left out, missing or unreadable: {listed(split.bad_images, 5)}'
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
            f'{len(other_size)} images have another size than the annotations say, whose boxes may not '
            f'fit: {listed(other_size, 5)}'
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
        split.notes.append(f'{strays} annotations left out, of images that the file does not list')
    unknown = sum(a['category_id'] not in number for a in annotations)
    if unknown:
        split.notes.append(f'{unknown} annotations left out, of categories that the file does not list')
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
    """Take a part of the training images for validation: changes ``train`` and returns the new split.

    Which ones follows from the seed and their file names alone, so that a few more images leave it nearly as it is.

    Raises:
        ValueError: There are fewer than two images, or the part is not between 0 and 1.
    """
    if not 0 < part < 1:
        raise ValueError(f'--val-part is {part}, but a number between 0 and 1 is needed, such as 0.2')
    images = train.content['images']
    if len(images) < 2:
        raise ValueError(
            f'{train.ann_file} has {len(images)} image, and training and validation need one each; add images'
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
        notes=[f'split off from the training data: {len(taken)} of {len(images)} images, seed {seed}'],
    )
    train.content, train.changed = choose(train.content, False), True
    return val


def write(split: Split, folder: Path) -> Path:
    """The file with the content of a split: a new one in ``folder`` if it was changed, else the one that came."""
    path = split.ann_file
    if split.changed:
        folder.mkdir(parents=True, exist_ok=True)
        path = (folder / f'{split.name}.json').absolute()
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(split.content, separators=(',', ':')))
    return path


# ---- what was found -------------------------------------------------------------------------------------------------
def describe(splits: Sequence[Split], classes: Sequence[str]) -> str:
    """A table of what the splits hold, and the notes on them."""
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

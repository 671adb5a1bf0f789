"""Custom data: find files in COCO format, check every record and image, and fix what can be fixed.

The modules `yolo` and `voc` read other formats as the same `Split`. Supported layouts of COCO data, with images
anywhere below the folder::

    DIR/train.json, val.json, images/                                 one folder of images
    DIR/annotations/instances_train2017.json, train2017/, …           COCO
    DIR/train/_annotations.coco.json, DIR/valid/_annotations.coco.json   Roboflow
    DIR/annotations.json                                              one file, of which a part is for validation
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePath

import cv2
import numpy as np

from msda_plugin.engine.data_check import check_boxes, check_records, described_box, find_degenerate, read_coco
from msda_plugin.engine.messages import counted, listed
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
IMAGE_SUFFIXES = ('.bmp', '.jpe', '.jpeg', '.jpg', '.jp2', '.png', '.tif', '.tiff', '.webp')
DEPTH = 3  # levels of subfolders that are searched for images
NEEDED = dict(images=('id', 'file_name'), annotations=('image_id', 'category_id', 'bbox'), categories=('id', 'name'))


@dataclass
class Split:
    """One annotation file with its images.

    Attributes:
        name: 'train', 'val' or 'test'.
        ann_file: The user's annotation file, or the folder of several.
        images: Folder that the file names are relative to.
        content: Content of the file in COCO format, which `clean` converts for training and evaluation.
        normalized: Whether the boxes are fractions of the image size, which `clean` converts to pixels.
        notes: Findings and changes, a sentence each.
        changed: Whether ``content`` differs from the file.
        bad_images: Problem of each image that cannot be used, by file name: 'missing', 'empty', 'unreadable', or
            'missing' with the names of several similar files.
        renamed: Images found under another extension or in other case: name in the file -> name on disk.
        nan_boxes: Annotations with NaN or infinite boxes, which `clean` drops.
    """

    name: str
    ann_file: Path
    images: Path
    content: dict
    notes: list[str] = field(default_factory=list)
    changed: bool = False
    bad_images: dict[str, str] = field(default_factory=dict)
    normalized: bool = False
    renamed: dict[str, str] = field(default_factory=dict)
    nan_boxes: list[dict] = field(default_factory=list)

    @property
    def most_boxes(self) -> int:
        """Maximum number of boxes per image."""
        return max(Counter(a['image_id'] for a in self.content['annotations']).values(), default=0)

    @property
    def without_boxes(self) -> list[str]:
        """File names of the images without a box."""
        used = {a['image_id'] for a in self.content['annotations']}
        return [image['file_name'] for image in self.content['images'] if image['id'] not in used]

    @property
    def degenerate(self) -> list[str]:
        """A description of each box that is not used: NaN, without width or height, or outside its image."""
        names = {image['id']: image['file_name'] for image in self.content['images']}
        sizes = {image['id']: (image['width'], image['height']) for image in self.content['images']}
        unknown = {image['id'] for image in self.content['images'] if image['file_name'] in self.bad_images}
        found = [(a, 'not a number') for a in self.nan_boxes if a['image_id'] in names]
        found += find_degenerate([a for a in self.content['annotations'] if a['image_id'] not in unknown], sizes)
        return [described_box(annotation, names, reason) for annotation, reason in found]


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
                and word_of(path) == split
                and _without_split(path) == _without_split(data)
            ]
            for split in ('val', 'test')
            if word_of(data) == 'train'
        }
        found = {'train': data, **{split: paths[0] for split, paths in siblings.items() if len(paths) == 1}}
    elif data.is_dir():
        found = _find_in_folder(data, need_val=val is None)
    else:
        raise FileNotFoundError(
            f'--data {data} does not exist; give a folder, or an annotation file (JSON in COCO format, or data.yaml)'
        )
    return {**found, 'val': Path(val)} if val is not None else found


def _find_in_folder(folder: Path, need_val: bool) -> dict[str, Path]:
    files = sorted(path for pattern in ('*.json', '*/*.json') for path in folder.glob(pattern))
    named: dict[str, list[Path]] = {split: [] for split in SPLITS}
    unnamed = []
    for path in files:
        split = word_of(path) or (word_of(path.parent) if path.parent != folder else None)
        (unnamed if split is None else named[split]).append(path)
    named['train'] = named['train'] or [path for path in unnamed if is_coco(path)]
    found = {}
    for split, paths in named.items():
        # The COCO data set also has files with captions and keypoints.
        paths = [path for path in paths if 'instances' in path.stem] or paths
        if len(paths) > 1 or split == 'test':  # a test file may have no annotations
            paths = [path for path in paths if is_coco(path)]
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
            f'no annotation file was found in {folder} and its subfolders: no COCO ({seen}), no data.yaml of YOLO, and '
            'no XML of Pascal VOC; give it with --data FILE'
        )
    return found


def word_of(path: Path) -> str | None:
    """The split that the name of a file or folder means: 'train', 'val' or 'test'; None if it means none."""
    return next((WORDS[word] for word in re.findall('[a-z]+', path.stem.lower()) if word in WORDS), None)


def _without_split(path: Path) -> tuple[str, ...]:
    return tuple(word for word in re.findall('[a-z]+', path.stem.lower()) if word not in WORDS)


def is_coco(path: Path) -> bool:
    """Whether a file has annotations in COCO format, which is read completely."""
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
    folders = [ann_file.parent, root, *subfolders(root, DEPTH)]
    # Folders of the same split come first: other splits may use the same file names.
    split = word_of(ann_file) or word_of(ann_file.parent)
    folders.sort(key=lambda folder: word_of(folder) != split)
    # Unlike Path.is_file, os.path.isfile does not raise for a name that is too long.
    found = {folder: sum(os.path.isfile(folder / name) for name in sample) for folder in dict.fromkeys(folders)}
    best = max(found, key=found.get)
    if not found[best]:
        search = SimilarNames()
        found = {folder: sum(bool(search(folder, name)) for name in sample) for folder in found}
        best = max(found, key=found.get)
    if not found[best]:
        raise FileNotFoundError(
            f'none of the images of {ann_file} (such as {names[0]}) was found in {root} and its subfolders; give the '
            'folder that the file names are relative to with --images DIR'
        )
    return best


def subfolders(root: Path, depth: int) -> list[Path]:
    """The folders below ``root``, ``depth`` levels deep, without hidden ones."""
    with os.scandir(root) as entries:  # knows folders without a system call per file
        below = sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    return below + [folder for path in below if depth > 1 for folder in subfolders(path, depth - 1)]


class SimilarNames:
    """Finds images whose names differ from those in an annotation file only by extension or upper and lower case."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, list[str]]] = {}  # folder -> name in lower case -> names

    def __call__(self, folder: Path, name: str) -> list[str]:
        """Similar names in ``folder``; those that differ only in case, if there are any."""
        *parents, last = PurePath(name).parts or ('',)
        found = ['']
        for part in parents:
            found = [os.path.join(path, entry) for path in found for entry in self._entries(folder / path, part)]
        same = [os.path.join(path, entry) for path in found for entry in self._entries(folder / path, last)]
        stem = os.path.splitext(last)[0]
        return same or [
            os.path.join(path, entry) for path in found for entry in self._entries(folder / path, stem, images=True)
        ]

    def _entries(self, folder: Path, name: str, images: bool = False) -> list[str]:
        """Entries of a folder with this name, in any case; ``images``: images with this stem."""
        if folder not in self._folders:
            entries = self._folders[folder] = {}
            for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                stem, suffix = os.path.splitext(entry.lower())
                entries.setdefault(entry.lower(), []).append(entry)
                if suffix in IMAGE_SUFFIXES:
                    entries.setdefault(f'{stem}/', []).append(entry)  # no name ends so
        return self._folders[folder].get(f'{name.lower()}/' if images else name.lower(), [])


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
    for annotation in content['annotations']:
        if isinstance(annotation, dict) and _has_nan(annotation.get('bbox')):  # which `clean` reports
            annotation.pop('area', None)
    for part, keys in NEEDED.items():
        check_records(ann_file, part, content[part], keys)
    if not content['images']:
        raise ValueError(f"the annotation file '{ann_file}' lists no images; give another file")
    check_boxes(ann_file, [a for a in content['annotations'] if not _has_nan(a['bbox'])])
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
def inspect_image(path: Path) -> tuple[tuple[int, int] | None, str]:
    """Read an image as the training does.

    Returns:
        (width, height) in pixels, None if it cannot be read; and its problem: '', 'missing', 'empty' or 'unreadable',
        which includes files whose end is missing.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, 'missing'
    except (OSError, ValueError):  # a folder, no permission; a name that the system does not accept
        return None, 'unreadable' if os.path.exists(path) else 'missing'
    if not data:
        return None, 'empty'
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        return None, 'unreadable'
    return (image.shape[1], image.shape[0]), ''


def _has_nan(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in box)
        and any(isinstance(value, float) and not math.isfinite(value) for value in box)
    )


def _inspect_images(split: Split, tick: Callable[[], object]) -> list[dict]:
    """Read every image; returns their records, with ``file_name`` as on disk and ``width`` and ``height`` as read.

    Fills ``bad_images`` and ``renamed``. Images that cannot be used keep the size of the annotation file, or get 0.
    """
    images = split.content['images']
    search, listed_names = SimilarNames(), {image['file_name'] for image in images}
    split.bad_images, split.renamed = {}, {}
    other_size, inspected = [], []
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:  # OpenCV releases the GIL
        results = pool.map(inspect_image, [split.images / image['file_name'] for image in images])
        for image, (size, problem) in zip(images, results, strict=True):
            name = image['file_name']
            if problem == 'missing':
                similar = [found for found in search(split.images, name) if found not in listed_names]
                if len(similar) == 1:
                    split.renamed[name], name = similar[0], similar[0]
                    listed_names.add(name)
                    size, problem = inspect_image(split.images / name)
                elif similar:
                    problem = f'missing, but there are {", ".join(similar)}'
            if problem:
                split.bad_images[name] = problem
            given = (image.get('width'), image.get('height'))
            if size and None not in given and given != size:
                other_size.append(name)
            width, height = given if None not in given else size or (0, 0)
            inspected.append({**image, 'file_name': name, 'width': width, 'height': height})
            tick()
    if split.renamed:
        split.notes.append(
            f'{counted(len(split.renamed), "image")} found under another extension or case: '
            + listed((f'{found} for {name}' for name, found in split.renamed.items()), 3)
        )
    if other_size:
        differ, their = ('differs', 'its') if len(other_size) == 1 else ('differ', 'their')
        split.notes.append(
            f'{counted(len(other_size), "image")} {differ} in size from the annotation file, so {their} boxes may be '
            f'wrong: {listed(other_size, 5)}'
        )
    return inspected


def clean(
    split: Split, classes: Sequence[str], *, skip_bad_images: bool = False, tick: Callable[[], object] = lambda: None
) -> None:
    """Read every image of a split and convert its content for training and evaluation, in place.

    The categories become ``classes``, in this order. Missing ``area``, ``iscrowd``, ``width`` and ``height`` are added,
    and normalized boxes converted to pixels. Annotations of other categories or unlisted images, and NaN boxes, are
    dropped; duplicate annotation ids are replaced. Other boxes are not changed.

    Every image is decoded completely, on all cores, because one that cannot be read would end the training in the
    middle of an epoch. OpenCV, which also reads the images of the training, refuses files whose end is missing.

    Args:
        split: From `load_split`, `yolo.load` or `voc.load`.
        classes: From `choose_classes`.
        skip_bad_images: Drop the images of ``bad_images``; otherwise they are only listed there.
        tick: Called after each image.
    """
    content = split.content
    categories = content['categories']
    if [category['name'] for category in categories] != list(classes):
        categories = [dict(id=index, name=name) for index, name in enumerate(classes, 1)]
    ids = {category['name']: category['id'] for category in categories}
    number = {category['id']: ids.get(str(category['name'])) for category in content['categories']}

    every_id = {image['id'] for image in content['images']}
    images = _inspect_images(split, tick)
    if split.bad_images and skip_bad_images:
        images = [image for image in images if image['file_name'] not in split.bad_images]
        split.notes.append(
            f'{counted(len(split.bad_images), "missing or unreadable image")} left out: {listed(split.bad_images, 5)}'
        )

    sizes = {image['id']: (image['width'], image['height']) for image in images}
    annotations = content['annotations']
    strays = sum(a['image_id'] not in every_id for a in annotations)
    if strays:
        split.notes.append(f'{counted(strays, "annotation")} of unlisted images left out')
    unknown = sum(a['category_id'] not in number for a in annotations)
    if unknown:
        split.notes.append(f'{counted(unknown, "annotation")} of unlisted categories left out')
    bad = [a for a in annotations if _has_nan(a['bbox'])]
    dropped = {id(a) for a in bad}
    split.nan_boxes = [_in_pixels(a, sizes[a['image_id']], split.normalized) for a in bad if a['image_id'] in sizes]
    if dropped:
        split.notes.append(f'{counted(len(dropped), "NaN or infinite box", "NaN or infinite boxes")} left out')
    kept = [
        {'iscrowd': 0, **_in_pixels(a, sizes[a['image_id']], split.normalized), 'category_id': number[a['category_id']]}
        for a in annotations
        if a['image_id'] in sizes and number.get(a['category_id']) is not None and id(a) not in dropped
    ]
    if len({a.get('id') for a in kept}) < len(kept) or any(a.get('id') is None for a in kept):
        kept = [{**a, 'id': index} for index, a in enumerate(kept, 1)]

    cleaned = dict(content, images=images, annotations=kept, categories=categories)
    split.changed = split.changed or cleaned != content
    split.content, split.normalized = cleaned, False


def _in_pixels(annotation: dict, size: tuple[float, float], normalized: bool) -> dict:
    box = annotation['bbox']
    if normalized:
        box = [round(value * side, 3) for value, side in zip(box, size * 2, strict=True)]
    return {'area': box[2] * box[3], **annotation, 'bbox': box}


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
            f'{train.ann_file} has {counted(len(images), "image")}, but training and validation need at least one '
            'each; add images'
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
        notes=[f'taken from the training data: {len(taken)} of {len(images)} images, seed {seed}'],
    )
    moved = {image['file_name'] for image in val.content['images']}
    for name in ('bad_images', 'renamed'):
        both = getattr(train, name)
        in_val = {key: value for key, value in both.items() if (value if name == 'renamed' else key) in moved}
        setattr(val, name, in_val)
        setattr(train, name, {key: value for key, value in both.items() if key not in in_val})
    val.nan_boxes = [a for a in train.nan_boxes if a['image_id'] in taken]
    train.nan_boxes = [a for a in train.nan_boxes if a['image_id'] not in taken]
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
def describe(splits: Sequence[Split], classes: Sequence[str], report: Path | None = None) -> str:
    """A table with the numbers of images and boxes in the splits, their notes, and the first findings of each kind.

    Args:
        splits: Checked by `clean`.
        classes: Names of the classes.
        report: File with the complete lists (`write_report`), which the text names if there are any.
    """
    rows = [
        ('', *(SPLITS[split.name] for split in splits)),
        ('images', *(len(split.content['images']) for split in splits)),
        ('  without a box', *(len(split.without_boxes) for split in splits)),
        ('  missing or unreadable', *(len(split.bad_images) for split in splits)),
        ('boxes', *(len(split.content['annotations']) for split in splits)),
        ('  degenerate, not used', *(len(split.degenerate) for split in splits)),
    ]
    counts = [count_boxes(split) for split in splits]
    rows += [(f'  {name}', *(count[name] for count in counts)) for name in classes[:20]]
    if len(classes) > 20:
        rows.append((f'  … {len(classes) - 20} more', *(sum(count[name] for name in classes[20:]) for count in counts)))
    first = max(len(row[0]) for row in rows)
    lines = ['  '.join([f'{row[0]:<{first}}', *(f'{cell:>10}' for cell in row[1:])]).rstrip() for row in rows]
    lines += ['', f'{counted(len(classes), "class", "classes")}: {listed(classes)}']
    for split in splits:
        lines.append(f'{SPLITS[split.name]}: {split.ann_file}, images in {split.images}')
        lines += [f'  note: {note}' for note in split.notes]
        unseen = [name for name in classes if not count_boxes(split)[name]]
        if unseen:
            lines.append(f'  note: no box of {listed(unseen, 5)}')
        lines += [f'  {title}: {listed(found, 3)}' for title, found in _findings(split).items()]
    if report is not None and any(_findings(split) for split in splits):
        lines.append(f'complete lists: {report}')
    return '\n'.join(lines)


def write_report(splits: Sequence[Split], path: Path) -> None:
    """Write a file with every image that is missing, unreadable or without a box, and every degenerate box."""
    lines = []
    for split in splits:
        lines.append(f'{SPLITS[split.name]}: {split.ann_file}, images in {split.images}')
        for title, found in _findings(split).items():
            lines += [f'  {title}', *(f'    {line}' for line in found)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write_text('\n'.join(lines) + '\n', encoding='utf-8', errors='surrogateescape')


def _findings(split: Split) -> dict[str, list[str]]:
    """What is wrong or unusual in a split: title with the number -> one line for each."""
    found = {}
    for kind in ('missing', 'empty', 'unreadable'):
        found[kind] = [
            name if problem == kind else f'{name} ({problem})'
            for name, problem in split.bad_images.items()
            if problem.startswith(kind)
        ]
    found = {f'{counted(len(lines), f"{kind} image")}': lines for kind, lines in found.items() if lines}
    if split.renamed:
        title = f'{counted(len(split.renamed), "image")} under another extension or case'
        found[title] = [f'{on_disk} for {name}' for name, on_disk in split.renamed.items()]
    if split.without_boxes:
        found[f'{counted(len(split.without_boxes), "image")} without a box'] = split.without_boxes
    if split.degenerate:
        found[counted(len(split.degenerate), 'degenerate box', 'degenerate boxes')] = split.degenerate
    return found

"""Custom data in Pascal VOC format: an XML file for each image.

Supported layouts::

    DIR/Annotations, JPEGImages, ImageSets/Main/train.txt, val.txt (or trainval.txt), test.txt     Pascal VOC
    DIR/train/1.jpg, 1.xml, …, DIR/valid/…                                                         pairs, split
    DIR/1.jpg, 1.xml, …, or DIR/images/1.jpg and DIR/annotations/1.xml                             pairs

Pixels of Pascal VOC are numbered from 1, and ``xmax`` and ``ymax`` are inside the box: ``xmin = 1, xmax = 20`` is 20
pixels wide and begins at 0. Detectron2 reads them so; MMDetection's boxes are one pixel smaller. ``difficult`` objects
become crowds, which are neither learned nor counted as missed, as with MMDetection.

Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath
from xml.etree import ElementTree

from msda_plugin.engine.data_check import MOST_PIXELS
from msda_plugin.engine.messages import counted, listed
from msda_plugin.tools.custom_data.coco import DEPTH, IMAGE_SUFFIXES, Split, subfolders, word_of

CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


def find(folder: Path) -> list[Path]:
    """The folders of Pascal VOC data: those that contain ``Annotations``, else ``folder`` if it has such XML files."""
    if folder.name == 'Annotations' and _has_lists_or_images(folder.parent):
        folder = folder.parent
    folders = [folder, *subfolders(folder, DEPTH)]
    with_files = [path for path in folders if _has_annotations(path)]
    standard = [path.parent for path in with_files if path.name == 'Annotations' and _has_lists_or_images(path.parent)]
    return standard or [folder] * bool(with_files)


def _has_lists_or_images(folder: Path) -> bool:
    return (folder / 'ImageSets').is_dir() or (folder / 'JPEGImages').is_dir()


def _has_annotations(folder: Path) -> bool:
    path = next(folder.glob('*.xml'), None)
    return path is not None and b'<annotation' in path.read_bytes()[:4096]


def load(folder: Path, images: Path | None = None) -> list[Split]:
    """Read the splits of Pascal VOC data: 'train', and 'val' and 'test' if there are any.

    Args:
        folder: One of those that `find` returns.
        images: Folder of the images; None: ``JPEGImages``, else anywhere in ``folder``.

    Raises:
        FileNotFoundError: If XML files or the folder of images are missing.
        ValueError: If an XML file is damaged, or objects lack a name or a box.
    """
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f'--images {images} does not exist; give the folder of the images')
    folder = folder.absolute()
    standard = _has_lists_or_images(folder) and (folder / 'Annotations').is_dir()
    files, notes = _listed_files(folder) if standard else _files_by_folder(folder)
    if images is None:
        images = folder / 'JPEGImages' if (folder / 'JPEGImages').is_dir() else folder
    finder = _ImageFinder(images.absolute())
    parsed = {}
    for split, paths in files.items():
        roots = [(path, _parse(path)) for path in paths]
        parsed[split] = [(path, root) for path, root in roots if root.tag == 'annotation']
    names = {_text(item, 'name') for each in parsed.values() for _, root in each for item in root.findall('object')}
    names = sorted(names - {''})
    splits = [_split(split, folder, each, names, finder) for split, each in parsed.items()]
    unused = finder.unused()
    if unused and not standard:
        notes.append(f'{counted(len(unused), "image")} without an XML file left out: {listed(unused, 3)}')
    splits[0].notes += notes
    return splits


# ---- the files of a split -------------------------------------------------------------------------------------------
def _listed_files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The XML files of each split, training first, by the lists in ``ImageSets/Main``; and notes."""
    annotations = folder / 'Annotations'
    lists = {path.stem: path for path in (folder / 'ImageSets' / 'Main').glob('*.txt')}
    chosen = dict(train=lists.get('train') or lists.get('trainval'), test=lists.get('test'))
    chosen['val'] = lists.get('val') if 'train' in lists else None
    if chosen['train'] is None:
        return dict(train=sorted(annotations.glob('*.xml'))), []
    files, notes = {}, []
    for split in ('train', 'val', 'test'):
        path = chosen[split]
        if path is None:
            continue
        ids = [line.split()[0] for line in _lines(path) if line.strip()]
        found = [annotations / f'{name}.xml' for name in ids]
        missing = [file.name for file in found if not os.path.isfile(file)]  # unlike Path.is_file, of any string
        if split == 'test' and len(missing) == len(found):
            notes.append(f'test data left out: {path} lists images without XML files')
        elif missing:
            raise FileNotFoundError(
                f'{counted(len(missing), "file")} of {counted(len(found), "image")} in {path} '
                f'{"is" if len(missing) == 1 else "are"} not in {annotations}: {listed(missing, 5)}'
            )
        else:
            files[split] = found
    return files, notes


def _files_by_folder(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The XML files of each split, training first, by the names of their folders; and notes."""
    files = defaultdict(list)
    for place in [folder, *subfolders(folder, DEPTH)]:
        files[_split_of(place.relative_to(folder))] += sorted(place.glob('*.xml'))
    files = {split: paths for split, paths in files.items() if paths}
    if 'train' not in files:
        return dict(train=[path for paths in files.values() for path in paths]), []
    others = files.get(None, [])
    notes = [f'{counted(len(others), "XML file")} outside of the folders of the splits left out'] if others else []
    return {split: files[split] for split in ('train', 'val', 'test') if split in files}, notes


def _split_of(path: Path) -> str | None:
    return next((word_of(Path(part)) for part in path.parts if word_of(Path(part))), None)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding='utf-8', errors='replace').splitlines()


class _ImageFinder:
    """Finds the image of an XML file: the one with its name, else the one that it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = defaultdict(list)  # stem in lower case -> paths
        self._used: set[Path] = set()
        for parent, _, names in os.walk(folder):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES and not name.startswith('.'):
                    self._paths[stem.lower()].append(Path(parent, name))

    def __call__(self, xml: Path, named: str) -> tuple[str, str]:
        """(name below ``folder``, '' or what is wrong with it)."""
        found = self._paths.get(xml.stem.lower()) or self._paths.get(PurePath(named).stem.lower()) or []
        for fits in (
            lambda path: path.parent == xml.parent,
            lambda path: _split_of(path.parent.relative_to(self.folder)) == _split_of_file(xml, self.folder),
            lambda path: path.stem == xml.stem,
            lambda path: path.name == named,
        ):
            if len(found) > 1:
                found = [path for path in found if fits(path)] or found
        if not found:
            return named or f'{xml.stem}.jpg', ''
        names = [path.relative_to(self.folder).as_posix() for path in found]
        self._used.update(found)
        return (names[0], '') if len(names) == 1 else (xml.stem, f'there are {", ".join(names)}')

    def unused(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix()
            for paths in self._paths.values()
            for path in paths
            if path not in self._used
        )


def _split_of_file(xml: Path, folder: Path) -> str | None:
    return _split_of(xml.parent.relative_to(folder)) if xml.is_relative_to(folder) else None


# ---- XML ------------------------------------------------------------------------------------------------------------
def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, UnicodeError, LookupError, ValueError) as error:
        raise ValueError(f'{path} is not valid XML: {error}') from None


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or '').strip()


def _number(text: str) -> float | None:
    """None if the text is no number, or an infinite or huge one; NaN is a degenerate box."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if abs(value) > MOST_PIXELS else value


def _split(
    name: str,
    folder: Path,
    parsed: Sequence[tuple[Path, ElementTree.Element]],
    names: Sequence[str],
    finder: _ImageFinder,
) -> Split:
    ids = {each: index for index, each in enumerate(names, 1)}
    records, annotations, problems, several = [], [], [], []
    for number, (path, root) in enumerate(parsed, 1):
        file_name, problem = finder(path, _text(root, 'filename'))
        if problem:
            several.append(f'{path.name}: {problem}')
        size = [_number(_text(root, f'size/{side}')) or 0 for side in ('width', 'height')]
        known = dict(width=int(size[0]), height=int(size[1])) if min(size) >= 1 else {}
        records.append(dict(id=number, file_name=file_name, **known))
        for index, item in enumerate(root.findall('object'), 1):
            label, corners = _text(item, 'name'), [_number(_text(item, f'bndbox/{corner}')) for corner in CORNERS]
            if not label or None in corners:
                lacks = 'name' if not label else 'bndbox with the numbers xmin, ymin, xmax and ymax'
                problems.append(f'object {index} of {path} has no {lacks}')
                continue
            left, top, right, bottom = corners
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=ids[label],
                    bbox=[left - 1, top - 1, right - left + 1, bottom - top + 1],
                    iscrowd=int(bool(_number(_text(item, 'difficult')) or 0)),
                )
            )
    if problems:
        raise ValueError(
            f'{counted(len(problems), "object")} of Pascal VOC {"is" if len(problems) == 1 else "are"} incomplete: '
            f'{"; ".join(problems[:5])}{f"; and {len(problems) - 5} more" if len(problems) > 5 else ""}'
        )
    if several:
        raise ValueError(
            f'several images fit {counted(len(several), "XML file")}: {listed(several, 3)}; give the folder of the '
            'images with --images DIR, or remove the others'
        )
    if not records:
        raise ValueError(f'{folder} has no images for {name}')
    difficult = sum(annotation['iscrowd'] for annotation in annotations)
    notes = [f'{counted(difficult, "difficult object")} ignored in training and evaluation'] if difficult else []
    categories = [dict(id=index, name=each) for each, index in ids.items()]
    content = dict(images=records, annotations=annotations, categories=categories)
    return Split(name, folder, finder.folder, content, notes, changed=True)

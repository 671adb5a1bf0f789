"""The format of custom data: COCO, YOLO or Pascal VOC, recognized by its files."""

from pathlib import Path

from msda_plugin.tools.custom_data import coco, voc, yolo
from msda_plugin.tools.custom_data.coco import SPLITS, Split

FORMATS = dict(coco='COCO', yolo='YOLO', voc='Pascal VOC')


def recognize(data: Path) -> str:
    """The format of an annotation file or of a folder: 'coco', 'yolo' or 'voc'; 'coco' if there is no sign of another.

    Raises:
        ValueError: If a folder has annotations in several formats, or YOLO labels without a YAML file.
    """
    if not data.is_dir():
        return 'yolo' if data.suffix.lower() in ('.yaml', '.yml') else 'coco'
    found = dict(yolo=yolo.find(data), voc=voc.find(data))
    found = {name: paths for name, paths in found.items() if paths}
    if found or yolo.find_labels(data):
        files = [path for pattern in ('*.json', '*/*.json') for path in sorted(data.glob(pattern))]
        found['coco'] = [path for path in files if coco.is_coco(path)][:1]
    found = {name: paths for name, paths in found.items() if paths}
    if len(found) > 1:
        named = ', '.join(f'{FORMATS[name]} ({paths[0]})' for name, paths in found.items())
        raise ValueError(f'{data} has annotations in several formats: {named}; choose one with --format NAME')
    label = None if found else yolo.find_labels(data)
    if label:
        raise ValueError(
            f'{data} has YOLO labels, such as {label}, but no data.yaml; write one with path, train, val and names'
        )
    return next(iter(found), 'coco')


def load_splits(
    data: Path, val: Path | None = None, images: Path | None = None, name: str | None = None
) -> list[Split]:
    """Read the splits of custom data, training first; their content is in COCO format.

    Args:
        data: A folder or an annotation file.
        val: Annotation file for validation, in COCO format; None: found with ``data``.
        images: Folder of the images, not for YOLO; None: found.
        name: 'coco', 'yolo' or 'voc'; None: recognized.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the format is not clear, files are damaged, or the arguments do not fit the format.
    """
    name = name or recognize(data)
    if name == 'coco':
        return _load_coco(data, val, images)
    if name == 'yolo':
        if images is not None:
            raise ValueError('--images does not apply to YOLO data, whose data.yaml names the images; remove --images')
        splits = yolo.load(data if data.is_file() else _only(data, yolo.find(data), 'data.yaml', 'FILE'))
    else:
        splits = voc.load(_only(data, voc.find(data) if data.is_dir() else [], 'XML', 'DIR'), images)
    if val is not None:
        splits = [split for split in splits if split.name != 'val']
        splits += _load_coco(data, val, None, only='val')
    return _sorted(splits)


def _load_coco(data: Path, val: Path | None, images: Path | None, only: str | None = None) -> list[Split]:
    found = dict(val=val) if only else coco.find_annotations(data, val)
    root = data if data.is_dir() else data.parent
    return _sorted(
        [
            coco.load_split(name, path, path.parent if name == 'val' and val else root, images)
            for name, path in found.items()
        ]
    )


def _only(data: Path, found: list[Path], what: str, kind: str) -> Path:
    if len(found) > 1:
        raise ValueError(f'{data} has several data sets: {", ".join(map(str, found))}; choose one with --data {kind}')
    if not found:
        raise FileNotFoundError(f'{data} has no {what} annotations; choose another --data, or another --format')
    return found[0]


def _sorted(splits: list[Split]) -> list[Split]:
    return sorted(splits, key=lambda split: list(SPLITS).index(split.name))

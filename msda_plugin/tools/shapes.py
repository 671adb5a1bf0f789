"""``python -m msda_plugin shapes``: generates a seeded detection data set in COCO format.

- ``shapes``: six plain shapes in images of 128 pixels, for training a detector from scratch in minutes, and for tests
  that need real files (`msda_plugin.tools.shape_images`).
- ``scenes``: textured, lit and occluded objects in images of 320 pixels, for pre-training a detector that is then
  trained on a few photographs (`msda_plugin.tools.scene_images`).

Both have the same layout::

    DIR/train/00000.jpg …  DIR/val/00000.jpg …  DIR/annotations/train.json, val.json  DIR/dataset.json

An image depends only on (kind, seed, split, index, size), so val is the same for any number of training images.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from msda_plugin.tools import scene_images
from msda_plugin.tools.common.progress import progress
from msda_plugin.tools.shape_images import CLASSES, FORMAT, draw_image

SPLITS = ('train', 'val')
MIN_SIDE, MAX_SIDE = 32, 2048  # of an image, pixels


@dataclass(frozen=True)
class Kind:
    """What a data set shows, and its usual size."""

    draw_image: Callable
    classes: tuple[str, ...]
    format: int  # version of the drawing
    size: tuple[int, int]  # (width, height), pixels
    train: int
    val: int
    compressed_masks: bool


KINDS = dict(
    shapes=Kind(draw_image, CLASSES, FORMAT, (128, 128), 1500, 300, False),
    scenes=Kind(scene_images.draw_image, scene_images.CLASSES, scene_images.FORMAT, (320, 320), 8000, 300, True),
)


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run-length encoding of a mask: by columns, starting with the zeros."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return runs if runs[-1] else runs[:-1]


def _compressed(mask: np.ndarray) -> str:
    """COCO's compressed run-length encoding of a mask."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))['counts'].decode()


def _write_split(
    root: Path, name: str, split: str, count: int, size: tuple[int, int], seed: int, tick: Callable
) -> None:
    kind = KINDS[name]
    encode = _compressed if kind.compressed_masks else _run_lengths
    folder = root / split
    folder.mkdir()
    images, annotations = [], []
    for index in range(count):
        image, shapes = kind.draw_image((seed, SPLITS.index(split), index), size)
        file_name = f'{index:05d}.jpg'
        written, data = cv2.imencode('.jpg', image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 95))
        if not written:
            raise RuntimeError('OpenCV cannot encode JPEG; install opencv-python from its wheel')
        (folder / file_name).write_bytes(data)
        images.append(dict(id=index + 1, file_name=file_name, width=size[0], height=size[1]))
        for shape in shapes:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=shape.label + 1,
                    bbox=shape.box,
                    area=int(shape.mask.sum()),
                    iscrowd=0,
                    segmentation=dict(size=[size[1], size[0]], counts=encode(shape.mask)),
                )
            )
        tick()
    categories = [dict(id=label + 1, name=text, supercategory='shape') for label, text in enumerate(kind.classes)]
    content = dict(
        info=dict(description=f'msda_plugin {name}, {split}', version=str(kind.format)),
        images=images,
        annotations=annotations,
        categories=categories,
    )
    (root / 'annotations' / f'{split}.json').write_text(json.dumps(content, separators=(',', ':')))


def _check(train: int, val: int, size: tuple[int, int], seed: int) -> None:
    for name, count in (('train', train), ('val', val)):
        if count < 1:
            raise ValueError(f'{name} must be at least 1 image, got {count}')
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ValueError(f'size must have sides of {MIN_SIDE} to {MAX_SIDE} pixels, got {size[0]}x{size[1]}')
    if seed < 0:
        raise ValueError(f'seed must not be negative, got {seed}')


def _recorded(out: Path) -> dict | None:
    """The parameters of the data set in ``out``; None: it contains no generated data set."""
    try:
        recorded = json.loads((out / 'dataset.json').read_text())
    except (OSError, ValueError):
        return None
    generators = [f'msda_plugin {name}' for name in KINDS]
    return recorded if isinstance(recorded, dict) and recorded.get('generator') in generators else None


def _is_complete(out: Path, parameters: dict) -> bool:
    """Whether no file of the data set is missing."""
    return all(
        (out / 'annotations' / f'{split}.json').is_file()
        and (out / split).is_dir()
        and len(os.listdir(out / split)) == parameters[split]
        for split in SPLITS
    )


def generate(
    out: str | os.PathLike,
    train: int | None = None,
    val: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    *,
    kind: str = 'shapes',
    force: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> bool:
    """Write the data set to the folder ``out``, unless it already contains the same data set.

    The same arguments and the same version of OpenCV give the same bytes. An error or Ctrl-C leaves no files.

    Args:
        out: Folder to write: a new or empty one, or one with a generated data set.
        train: Number of training images, at least 1; None: 1500 shapes, 8000 scenes.
        val: Number of validation images, at least 1; None: 300.
        size: (width, height) of every image, pixels, each from 32 to 2048; None: 128×128 shapes, 320×320 scenes.
        seed: Seed, at least 0.
        kind: 'shapes' or 'scenes'.
        force: Replace an existing generated data set.
        tick: Called after each image.

    Returns:
        Whether the data set was written; False: it already exists.

    Raises:
        ValueError: If a parameter is out of range.
        FileExistsError: If ``out`` contains another data set and ``force`` is False, or other files.
        OSError: If ``out`` cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got '{kind}'")
    chosen = KINDS[kind]
    train, val = chosen.train if train is None else train, chosen.val if val is None else val
    size = chosen.size if size is None else tuple(size)
    _check(train, val, size, seed)
    out = Path(out).resolve()
    parameters = dict(
        generator=f'msda_plugin {kind}',
        format=chosen.format,
        train=train,
        val=val,
        size=list(size),
        seed=seed,
        classes=list(chosen.classes),
    )
    present = _recorded(out)
    if present == parameters and _is_complete(out, parameters) and not force:
        return False
    if present is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} exists and is not a {kind} data set; choose a new or empty folder')
    if present is not None and not force:
        state = 'with missing files' if present == parameters else 'with other parameters'
        recorded = present['generator'].split()[-1]
        raise FileExistsError(
            f'{out} contains a {recorded} data set {state}; pass --force to replace it, or choose another folder'
        )

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f'{error.filename} is a file, not a folder') from None
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as scratch:
        fresh = Path(scratch, 'fresh')
        (fresh / 'annotations').mkdir(parents=True)
        for split, count in zip(SPLITS, (train, val), strict=True):
            _write_split(fresh, kind, split, count, size, seed, tick)
        (fresh / 'dataset.json').write_text(json.dumps(parameters, indent=1) + '\n')
        if present is not None:
            out.rename(Path(scratch, 'old'))
        fresh.rename(out)
    return True


# ---- the command ---------------------------------------------------------------------------------------------------
def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a side such as 128 or WIDTHxHEIGHT such as 160x128, got '{text}'")
    return int(match[1]), int(match[2] or match[1])


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin shapes',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Generate a seeded detection data set in COCO format.',
        epilog='examples:\n'
        '  python -m msda_plugin shapes --out data/shapes --train 1500 --val 300 --size 128\n'
        '  python -m msda_plugin shapes --kind scenes --out data/scenes',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='output folder')
    parser.add_argument(
        '--kind',
        choices=KINDS,
        default='shapes',
        help='six plain shapes, or scenes of textured, lit and occluded objects (default: %(default)s)',
    )
    parser.add_argument('--train', type=int, metavar='N', help='training images (default: 1500 shapes or 8000 scenes)')
    parser.add_argument('--val', type=int, metavar='N', help='validation images (default: 300)')
    parser.add_argument(
        '--size',
        type=_size,
        metavar='S|WxH',
        help='image size in pixels: a side, or width x height (default: 128 for shapes, 320 for scenes)',
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='replace an existing generated data set')
    args = parser.parse_args(argv)
    kind = KINDS[args.kind]
    train, val = kind.train if args.train is None else args.train, kind.val if args.val is None else args.val
    size = args.size or kind.size
    try:
        written = generate(
            args.out, train, val, size, args.seed, kind=args.kind, force=args.force, tick=progress(train + val)
        )
    except (ValueError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to '{args.out}': {error.strerror or error}; choose another --out", file=sys.stderr)
        return 2
    state = 'wrote' if written else 'already exists:'
    print(
        f'{state} {args.out}: {train} train and {val} val images of {size[0]}x{size[1]}, '
        f'classes {", ".join(kind.classes)}'
    )
    return 0

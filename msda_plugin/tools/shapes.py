"""``python -m msda_plugin shapes``: generates a seeded detection data set of drawn shapes in COCO format.

It is made for training a detector from scratch in minutes, and for tests that need real files::

    DIR/train/00000.jpg …  DIR/val/00000.jpg …  DIR/annotations/train.json, val.json  DIR/dataset.json

An image depends only on (seed, split, index, size), so val is the same for any number of training images. See
`msda_plugin.tools.shape_images` for what the images show.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from msda_plugin.tools.common.progress import progress
from msda_plugin.tools.shape_images import CLASSES, FORMAT, draw_image

SPLITS = ('train', 'val')
MIN_SIDE, MAX_SIDE = 32, 2048  # of an image, pixels


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run-length encoding of a mask: by columns, starting with the zeros."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return runs if runs[-1] else runs[:-1]


def _write_split(root: Path, split: str, count: int, size: tuple[int, int], seed: int, tick: Callable) -> None:
    folder = root / split
    folder.mkdir()
    images, annotations = [], []
    for index in range(count):
        image, shapes = draw_image((seed, SPLITS.index(split), index), size)
        name = f'{index:05d}.jpg'
        written, data = cv2.imencode('.jpg', image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 95))
        if not written:
            raise RuntimeError('OpenCV cannot encode JPEG; install opencv-python from its wheel')
        (folder / name).write_bytes(data)
        images.append(dict(id=index + 1, file_name=name, width=size[0], height=size[1]))
        for shape in shapes:
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=shape.label + 1,
                    bbox=shape.box,
                    area=int(shape.mask.sum()),
                    iscrowd=0,
                    segmentation=dict(size=[size[1], size[0]], counts=_run_lengths(shape.mask)),
                )
            )
        tick()
    categories = [dict(id=label + 1, name=name, supercategory='shape') for label, name in enumerate(CLASSES)]
    content = dict(
        info=dict(description=f'msda_plugin shapes, {split}', version=str(FORMAT)),
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
    """The parameters of the data set in ``out``; None: it contains no shapes data set."""
    try:
        recorded = json.loads((out / 'dataset.json').read_text())
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) and recorded.get('generator') == 'msda_plugin shapes' else None


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
    train: int = 1500,
    val: int = 300,
    size: tuple[int, int] = (128, 128),
    seed: int = 0,
    *,
    force: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> bool:
    """Write the data set to the folder ``out``, unless it already contains the same data set.

    The same arguments and the same version of OpenCV give the same bytes. An error or Ctrl-C leaves no files.

    Args:
        out: Folder to write: a new or empty one, or one with a shapes data set.
        train: Number of training images, at least 1.
        val: Number of validation images, at least 1.
        size: (width, height) of every image, pixels, each from 32 to 2048.
        seed: Seed, at least 0.
        force: Replace an existing shapes data set.
        tick: Called after each image.

    Returns:
        Whether the data set was written; False: it already exists.

    Raises:
        ValueError: If a parameter is out of range.
        FileExistsError: If ``out`` contains another data set and ``force`` is False, or other files.
        OSError: If ``out`` cannot be written.
    """
    size = tuple(size)
    _check(train, val, size, seed)
    out = Path(out).resolve()
    parameters = dict(
        generator='msda_plugin shapes',
        format=FORMAT,
        train=train,
        val=val,
        size=list(size),
        seed=seed,
        classes=list(CLASSES),
    )
    present = _recorded(out)
    if present == parameters and _is_complete(out, parameters) and not force:
        return False
    if present is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} exists and is not a shapes data set; choose a new or empty folder')
    if present is not None and not force:
        state = 'with missing files' if present == parameters else 'with other parameters'
        raise FileExistsError(
            f'{out} contains a shapes data set {state}; pass --force to replace it, or choose another folder'
        )

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f'{error.filename} is a file, not a folder') from None
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as scratch:
        fresh = Path(scratch, 'fresh')
        (fresh / 'annotations').mkdir(parents=True)
        for split, count in zip(SPLITS, (train, val), strict=True):
            _write_split(fresh, split, count, size, seed, tick)
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
        description='Generate a seeded detection data set of drawn shapes in COCO format.',
        epilog='example: python -m msda_plugin shapes --out data/shapes --train 1500 --val 300 --size 128',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='output folder')
    parser.add_argument('--train', type=int, default=1500, metavar='N', help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=300, metavar='N', help='validation images (default: %(default)s)')
    parser.add_argument(
        '--size',
        type=_size,
        default=(128, 128),
        metavar='S|WxH',
        help='image size in pixels: a side, or width x height (default: 128)',
    )
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='replace an existing shapes data set')
    args = parser.parse_args(argv)
    try:
        written = generate(
            args.out, args.train, args.val, args.size, args.seed, force=args.force, tick=progress(args.train + args.val)
        )
    except (ValueError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to '{args.out}': {error.strerror or error}; choose another --out", file=sys.stderr)
        return 2
    state = 'wrote' if written else 'already exists:'
    print(
        f'{state} {args.out}: {args.train} train and {args.val} val images of {args.size[0]}x{args.size[1]}, '
        f'classes {", ".join(CLASSES)}'
    )
    return 0

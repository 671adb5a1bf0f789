"""``python -m msda_plugin shapes``: a seeded detection data set of drawn shapes, in COCO format.

Six classes (circle, square, triangle, star, ring, cross), rotated, from about 12 to 80 pixels in an image of 128, over
varied backgrounds, with overlaps; colour and texture never tell the class. One image in twenty holds no object. It is
made for training a detector from scratch in minutes, and for tests that need real files::

    DIR/train/00000.jpg …  DIR/val/00000.jpg …  DIR/annotations/train.json, val.json  DIR/dataset.json

Boxes, areas and masks are those of the *visible* part of an object inside the image, as in COCO. No object is painted
that is not annotated: a place where one would hide more than a third of another is not taken. An image depends on
(seed, split, index, size) alone, so that val is the same whatever the number of training images.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
SPLITS = ('train', 'val')
FORMAT = 1  # of the drawing: raise it when the same seed gives other pictures

MIN_SIDE, MAX_SIDE = 32, 2048  # of an image, pixels
MIN_OBJECT = 8.0  # longer side of the smallest object, pixels
OBJECT_RANGE = (0.1, 0.62)  # longer side of an object, as a part of the image's shorter side
EMPTY_IMAGES = 0.05  # part of images without an object
MAX_OBJECTS = 7
MIN_VISIBLE = 0.66  # part of an object that objects on top of it leave visible
MIN_INSIDE = 0.8  # part of an object that lies inside the image
SUPERSAMPLING = 4  # masks are drawn this many times finer, hence boxes in quarters of a pixel


@dataclass(frozen=True)
class Annotation:
    """One object of an image.

    label indexes ``CLASSES``; box is (x, y, w, h) in pixels; mask is (H, W) bool, the pixels of which at least half
    show the object; both cover the visible part alone.
    """

    label: int
    box: tuple[float, float, float, float]
    mask: np.ndarray


# ---- outlines: lists of closed polygons, (num_points, 2) in any unit, even-odd rule --------------------------------
def _regular(points: int, radius: float = 1.0) -> np.ndarray:
    angle = np.arange(points) * (2 * np.pi / points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _outline(label: int) -> list[np.ndarray]:
    """Outline of a class around the origin, unrotated."""
    name = CLASSES[label]
    if name == 'circle':
        return [_regular(64)]
    if name == 'square':
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])]
    if name == 'triangle':
        return [_regular(3)]
    if name == 'star':
        star = _regular(10)
        star[1::2] *= 0.42
        return [star]
    if name == 'ring':
        return [_regular(64), _regular(64, 0.52)]
    arm = 0.32
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
    turn = np.array([[0, -1], [1, 0]])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn.T, k) for k in range(4)])]


def _place(rng: np.random.Generator, label: int, extent: float, centre: np.ndarray) -> list[np.ndarray]:
    """The outline, slightly stretched, turned, its longer side ``extent`` pixels, around ``centre`` (x, y)."""
    stretch = rng.uniform(0.85, 1.0)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    polygons = [polygon * (1.0, stretch) @ turn for polygon in _outline(label)]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    scale = extent / (high - low).max()
    return [(polygon - (low + high) / 2) * scale + centre for polygon in polygons]


# ---- patterns: scalar fields (h, w) in 0-1, from which two colours are mixed ----------------------------------------
def _grid(h: int, w: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (h, w) in pixels along two perpendicular directions."""
    y, x = np.mgrid[:h, :w].astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def _plain(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return np.full((h, w), 0.5, np.float32)


def _gradient(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    u, _ = _grid(h, w, rng.uniform(0, 2 * np.pi))
    return (u - u.min()) / max(float(np.ptp(u)), 1.0)


def _period(rng: np.random.Generator, h: int, w: int) -> float:
    return max(4.0, min(h, w) * rng.uniform(0.1, 0.35))


def _stripes(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    u, _ = _grid(h, w, rng.uniform(0, np.pi))
    wave = np.sin(u * (2 * np.pi / _period(rng, h, w)) + rng.uniform(0, 2 * np.pi))
    return np.clip(0.5 + rng.uniform(0.5, 3) * wave, 0, 1)


def _checker(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    u, v = _grid(h, w, rng.uniform(0, np.pi))
    rate = 2 * np.pi / (_period(rng, h, w) * 1.5)
    return np.clip(0.5 + 4 * np.sin(u * rate) * np.sin(v * rate), 0, 1)


def _dots(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    u, v = _grid(h, w, rng.uniform(0, np.pi))
    rate = 2 * np.pi / _period(rng, h, w)
    return np.clip(2 * (np.cos(u * rate) + np.cos(v * rate)) - 1, 0, 1)


def _blobs(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    cells = int(rng.integers(3, 9))
    coarse = rng.random((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC), 0, 1)


def _grain(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    field = rng.random((h, w), dtype=np.float32)
    return cv2.GaussianBlur(field, (0, 0), rng.uniform(0.6, 1.6))


PATTERNS: tuple[Callable[[np.random.Generator, int, int], np.ndarray], ...] = (
    _plain,
    _gradient,
    _stripes,
    _checker,
    _dots,
    _blobs,
    _grain,
)
PLAIN_PATTERNS = PATTERNS[:2]  # what still reads as one surface on an object of a dozen pixels


def _mix(field: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(h, w, 3 or 1) float32: ``first`` where the field is 0, ``second`` where it is 1."""
    return first + field[..., None] * (second - first)


def _colour(rng: np.random.Generator, saturation: tuple[float, float]) -> np.ndarray:
    """A random RGB colour, 0-255 float32, dark to bright, of a saturation in this range of 0-1."""
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(0.12, 1)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def _near(rng: np.random.Generator, colour: np.ndarray, distance: float) -> np.ndarray:
    """A colour at most ``distance`` away on each channel."""
    return np.clip(colour + rng.uniform(-distance, distance, 3), 0, 255).astype(np.float32)


def _contrasting(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """A random colour that stands out from ``patch`` (h, w, 3): by a random amount, above the patch's texture."""
    mean, deviation = (value[:, 0] for value in cv2.meanStdDev(patch))
    wanted = rng.uniform(70, 150) + 0.5 * deviation.mean()
    candidates = np.stack([_colour(rng, (0.1, 1.0)) for _ in range(12)])
    distance = np.linalg.norm(candidates - mean, axis=1)
    enough = np.flatnonzero(distance >= wanted)
    return candidates[enough[0] if len(enough) else distance.argmax()]


# ---- one image -----------------------------------------------------------------------------------------------------
def _background(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    base = _colour(rng, (0.0, 0.65))
    image = np.zeros((h, w, 3), np.float32)
    for distance, weight in ((rng.uniform(10, 70), 0.65), (rng.uniform(10, 70), 0.35)):
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        image += weight * _mix(pattern(rng, h, w), base, _near(rng, base, distance))
    return image


def _coverage(polygons: list[np.ndarray], h: int, w: int) -> np.ndarray:
    """(h·s, w·s) uint8, 1 inside the polygons (pixels), s = ``SUPERSAMPLING``."""
    shift = 4  # fillPoly takes fixed-point numbers; its pixel centres lie at whole numbers
    fixed = [np.rint((polygon * SUPERSAMPLING - 0.5) * 2**shift).astype(np.int32) for polygon in polygons]
    return cv2.fillPoly(np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8), fixed, 1, shift=shift)


def _area(polygons: list[np.ndarray]) -> float:
    """Area of an outline less its hole, pixels."""
    outer, *holes = (cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons)
    return outer - sum(holes)


def _paint(rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray, extent: float) -> None:
    """Paint the object in place: two colours that stand out here, a pattern, sometimes a rim."""
    h, w = image.shape[:2]
    alpha = cv2.resize(coverage.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
    x, y, bw, bh = cv2.boundingRect((alpha > 0).astype(np.uint8))
    box = np.s_[y : y + bh, x : x + bw]
    margin = max(2, round(extent / 8))
    around = image[max(0, y - margin) : y + bh + margin, max(0, x - margin) : x + bw + margin]
    first = _contrasting(rng, around)
    second = _near(rng, first, rng.uniform(10, 80))
    patterns = PATTERNS if extent >= 20 else PLAIN_PATTERNS
    fill = _mix(patterns[rng.integers(len(patterns))](rng, bh, bw), first, second)
    if extent >= 16 and rng.random() < 0.4:
        width = max(1, round(extent * rng.uniform(0.03, 0.07))) * SUPERSAMPLING
        padded = cv2.copyMakeBorder(coverage, 1, 1, 1, 1, cv2.BORDER_REPLICATE)  # no rim along the image's own edge
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
        core = cv2.erode(padded, kernel)[1:-1, 1:-1].astype(np.float32)
        inner = cv2.resize(core, (w, h), interpolation=cv2.INTER_AREA)[box][..., None]
        rim = np.clip(first * rng.choice((0.45, 1.6)), 0, 255)
        fill = inner * fill + (1 - inner) * rim
    weight = alpha[box][..., None]
    image[box] += weight * (fill - image[box])


def draw_image(seed: int | Sequence[int], size: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, list[Annotation]]:
    """Draw one image.

    Args:
        seed: What numpy's ``default_rng`` takes; all that is random follows from it.
        size: (width, height), pixels.

    Returns:
        The image, (H, W, 3) uint8 RGB, and its annotations in the order of painting.
    """
    rng = np.random.default_rng(seed)
    w, h = size
    image = _background(rng, h, w)
    wanted = 0 if rng.random() < EMPTY_IMAGES else int(rng.integers(1, MAX_OBJECTS + 1))

    low, high = (part * min(w, h) for part in OBJECT_RANGE)
    low = max(low, MIN_OBJECT)
    owner = np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8)  # a fine pixel shows object 1, 2, …; 0: none
    labels: list[int] = []
    whole, shown = np.zeros((2, MAX_OBJECTS))  # fine pixels of each object inside the image; and of those, seen ones
    for _ in range(wanted):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(10):  # tries to find a place
            extent = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            polygons = _place(rng, label, extent, rng.uniform((0, 0), (w, h)))
            coverage = _coverage(polygons, h, w)
            area = cv2.countNonZero(coverage)
            if area < MIN_INSIDE * _area(polygons) * SUPERSAMPLING**2:
                continue
            hidden = np.bincount(owner[coverage > 0], minlength=MAX_OBJECTS + 1)[1:]
            if np.all(shown - hidden >= MIN_VISIBLE * whole):
                labels.append(label)
                owner[coverage > 0] = len(labels)
                shown -= hidden
                whole[len(labels) - 1] = shown[len(labels) - 1] = area
                _paint(rng, image, coverage, extent)
                break

    image *= _mix(_gradient(rng, h, w), *rng.uniform((0.75, 1.0), (1.0, 1.2)).astype(np.float32))  # light from a side
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.8))
    image += rng.normal(0, rng.uniform(0, 7), image.shape)
    image = np.clip(image, 0, 255).round().astype(np.uint8)
    return image, [_annotate(label, owner == index) for index, label in enumerate(labels, 1)]


def _annotate(label: int, visible: np.ndarray) -> Annotation:
    """The annotation of the visible part, (H·s, W·s) bool."""
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    x1, y1, x2, y2 = (edge / SUPERSAMPLING for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    h, w = (length // SUPERSAMPLING for length in visible.shape)
    mask = cv2.resize(visible.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA) >= 0.5
    return Annotation(label, (x1, y1, x2 - x1, y2 - y1), mask)


# ---- the data set --------------------------------------------------------------------------------------------------
def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask: column by column, starting with the zeros."""
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
            raise RuntimeError('OpenCV cannot encode JPEG; install an opencv-python wheel, which can')
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
            raise ValueError(f'{name} is the number of images of a split and must be at least 1, got {count}')
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ValueError(f'size must have sides of {MIN_SIDE} to {MAX_SIDE} pixels, got {size[0]}x{size[1]}')
    if seed < 0:
        raise ValueError(f'seed must not be negative, got {seed}')


def _recorded(out: Path) -> dict | None:
    """The parameters of the data set in ``out``; None where there is none."""
    try:
        recorded = json.loads((out / 'dataset.json').read_text())
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) and recorded.get('generator') == 'msda_plugin shapes' else None


def _is_whole(out: Path, parameters: dict) -> bool:
    """Whether every file of the data set is there."""
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
    """Write the data set to the folder ``out``, whole or not at all; leave it alone if it is there already.

    The same arguments (and the same OpenCV) give the same bytes.

    Args:
        out: Folder to make. An empty one is taken; one that holds other things is never touched.
        train: Number of training images, at least 1.
        val: Number of validation images, at least 1.
        size: (width, height) of every image, pixels, each from 32 to 2048.
        seed: Not negative.
        force: Replace a data set of this generator that is there.
        tick: Called after each image.

    Returns:
        Whether the data set was written; False: it was there.

    Raises:
        ValueError: A parameter is out of range.
        FileExistsError: ``out`` holds another data set (and ``force`` is off), or something else.
        OSError: ``out`` cannot be written.
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
    if present == parameters and _is_whole(out, parameters) and not force:
        return False
    if present is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out} exists and is not a shapes data set; choose a folder that is new or empty')
    if present is not None and not force:
        state = 'with files missing' if present == parameters else 'with other parameters'
        raise FileExistsError(
            f'{out} holds a shapes data set {state}; pass --force to replace it, or choose another folder'
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


def _progress(total: int) -> Callable[[], object]:
    """A live bar where someone watches; silence where the output goes to a file."""
    if not sys.stderr.isatty():
        return lambda: None
    from mmengine.utils import ProgressBar  # here: a second to import, which a call with nothing to do need not wait

    return ProgressBar(total, file=sys.stderr).update


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin shapes',
        description='Write a seeded data set of drawn shapes in COCO format.',
        epilog='example: python -m msda_plugin shapes --out data/shapes --train 1500 --val 300 --size 128',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to make')
    parser.add_argument('--train', type=int, default=1500, metavar='N', help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=300, metavar='N', help='validation images (default: %(default)s)')
    parser.add_argument(
        '--size',
        type=_size,
        default=(128, 128),
        metavar='S|WxH',
        help='pixels of an image: a side, or width x height (default: 128)',
    )
    parser.add_argument('--seed', type=int, default=0, help='same seed, same data (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='replace a shapes data set that is there')
    args = parser.parse_args(argv)
    try:
        written = generate(
            args.out,
            args.train,
            args.val,
            args.size,
            args.seed,
            force=args.force,
            tick=_progress(args.train + args.val),
        )
    except (ValueError, FileExistsError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to '{args.out}': {error.strerror or error}; choose another --out", file=sys.stderr)
        return 2
    if sys.stderr.isatty() and written:
        print(file=sys.stderr)
    state = 'wrote' if written else 'already there:'
    print(
        f'{state} {args.out}: {args.train} train and {args.val} val images of {args.size[0]}x{args.size[1]}, '
        f'classes {", ".join(CLASSES)}'
    )
    return 0

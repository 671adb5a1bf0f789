"""Draws the images of the shapes data set, with their annotations.

Six classes (circle, square, triangle, star, ring, cross), rotated, from about 12 to 80 pixels in an image of 128, over
varied backgrounds, with overlaps. Color and texture are independent of the class. One image in twenty has no object.

Boxes, areas and masks cover the *visible* part of an object inside the image, as in COCO. Every painted object is
annotated: an object is not placed where it would hide more than a third of another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
FORMAT = 1  # version of the drawing; increase it when the same seed draws other images

MIN_OBJECT = 8.0  # longer side of the smallest object, pixels
OBJECT_RANGE = (0.1, 0.62)  # longer side of an object, relative to the shorter side of the image
EMPTY_IMAGES = 0.05  # fraction of images without an object
MAX_OBJECTS = 7
MIN_VISIBLE = 0.66  # minimum fraction of an object that other objects do not hide
MIN_INSIDE = 0.8  # minimum fraction of an object inside the image
SUPERSAMPLING = 4  # masks are drawn at this multiple of the resolution, so boxes are multiples of 1/4 pixel


@dataclass(frozen=True)
class Annotation:
    """The visible part of one object of an image.

    Attributes:
        label: Index into ``CLASSES``.
        box: (x, y, w, h) in pixels.
        mask: (H, W) bool; True where the object covers at least half of the pixel.
    """

    label: int
    box: tuple[float, float, float, float]
    mask: np.ndarray


# ---- outlines: lists of closed polygons, (num_points, 2) in any unit, even-odd rule --------------------------------
def regular_polygon(points: int, radius: float = 1.0) -> np.ndarray:
    angle = np.arange(points) * (2 * np.pi / points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _outline(label: int) -> list[np.ndarray]:
    """Outline of a class around the origin, not rotated."""
    name = CLASSES[label]
    if name == 'circle':
        return [regular_polygon(64)]
    if name == 'square':
        return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])]
    if name == 'triangle':
        return [regular_polygon(3)]
    if name == 'star':
        star = regular_polygon(10)
        star[1::2] *= 0.42
        return [star]
    if name == 'ring':
        return [regular_polygon(64), regular_polygon(64, 0.52)]
    arm = 0.32
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
    turn = np.array([[0, -1], [1, 0]])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn.T, k) for k in range(4)])]


def _place(rng: np.random.Generator, label: int, extent: float, center: np.ndarray) -> list[np.ndarray]:
    """The outline, randomly stretched and rotated, with longer side ``extent`` (pixels), around ``center`` (x, y)."""
    stretch = rng.uniform(0.85, 1.0)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    polygons = [polygon * (1.0, stretch) @ turn for polygon in _outline(label)]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    scale = extent / (high - low).max()
    return [(polygon - (low + high) / 2) * scale + center for polygon in polygons]


# ---- patterns: (h, w) weights from 0 to 1 that mix two colors ------------------------------------------------------
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
PLAIN_PATTERNS = PATTERNS[:2]  # for objects of a dozen pixels


def mix(field: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(h, w, 3 or 1) float32: ``first`` where the field is 0, ``second`` where it is 1."""
    return first + field[..., None] * (second - first)


def random_color(rng: np.random.Generator, saturation: tuple[float, float]) -> np.ndarray:
    """A random RGB color, 0-255 float32, of any brightness, with a saturation in this range (0-1)."""
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(0.12, 1)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def near_color(rng: np.random.Generator, color: np.ndarray, distance: float) -> np.ndarray:
    """A random color that differs by at most ``distance`` in each channel."""
    return np.clip(color + rng.uniform(-distance, distance, 3), 0, 255).astype(np.float32)


def _contrasting(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """A random color that contrasts with ``patch`` (h, w, 3) by a random amount, more on a textured patch."""
    mean, deviation = (value[:, 0] for value in cv2.meanStdDev(patch))
    return distant_color(rng, mean, rng.uniform(70, 150) + 0.5 * deviation.mean())


def distant_color(
    rng: np.random.Generator, color: np.ndarray, wanted: float, saturation: tuple[float, float] = (0.1, 1.0)
) -> np.ndarray:
    """A random color at least ``wanted`` from ``color`` (Euclidean), or the most distant one of a dozen."""
    candidates = np.stack([random_color(rng, saturation) for _ in range(12)])
    distance = np.linalg.norm(candidates - color, axis=1)
    enough = np.flatnonzero(distance >= wanted)
    return candidates[enough[0] if len(enough) else distance.argmax()]


# ---- one image -----------------------------------------------------------------------------------------------------
def _background(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    base = random_color(rng, (0.0, 0.65))
    image = np.zeros((h, w, 3), np.float32)
    for distance, weight in ((rng.uniform(10, 70), 0.65), (rng.uniform(10, 70), 0.35)):
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        image += weight * mix(pattern(rng, h, w), base, near_color(rng, base, distance))
    return image


def _coverage(polygons: list[np.ndarray], h: int, w: int) -> np.ndarray:
    """(h·s, w·s) uint8, 1 inside the polygons (pixels), s = ``SUPERSAMPLING``."""
    shift = 4  # fillPoly takes fixed-point numbers, with pixel centers at integers
    fixed = [np.rint((polygon * SUPERSAMPLING - 0.5) * 2**shift).astype(np.int32) for polygon in polygons]
    return cv2.fillPoly(np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8), fixed, 1, shift=shift)


def _area(polygons: list[np.ndarray]) -> float:
    """Area of an outline without its hole, pixels."""
    outer, *holes = (cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons)
    return outer - sum(holes)


def _paint(rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray, extent: float) -> None:
    """Paint the object in place, with two contrasting colors, a pattern and sometimes a rim."""
    h, w = image.shape[:2]
    alpha = cv2.resize(coverage.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA)
    x, y, bw, bh = cv2.boundingRect((alpha > 0).astype(np.uint8))
    box = np.s_[y : y + bh, x : x + bw]
    margin = max(2, round(extent / 8))
    around = image[max(0, y - margin) : y + bh + margin, max(0, x - margin) : x + bw + margin]
    first = _contrasting(rng, around)
    second = near_color(rng, first, rng.uniform(10, 80))
    patterns = PATTERNS if extent >= 20 else PLAIN_PATTERNS
    fill = mix(patterns[rng.integers(len(patterns))](rng, bh, bw), first, second)
    if extent >= 16 and rng.random() < 0.4:
        width = max(1, round(extent * rng.uniform(0.03, 0.07))) * SUPERSAMPLING
        padded = cv2.copyMakeBorder(coverage, 1, 1, 1, 1, cv2.BORDER_REPLICATE)  # no rim along the border of the image
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
        seed: Seed for numpy's ``default_rng``.
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
    owner = np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8)  # visible object 1, 2, …; 0: background
    labels: list[int] = []
    inside, shown = np.zeros((2, MAX_OBJECTS))  # supersampled pixels of each object inside the image; visible ones
    for _ in range(wanted):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(10):  # attempts to find a place
            extent = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            polygons = _place(rng, label, extent, rng.uniform((0, 0), (w, h)))
            coverage = _coverage(polygons, h, w)
            area = cv2.countNonZero(coverage)
            if area < MIN_INSIDE * _area(polygons) * SUPERSAMPLING**2:
                continue
            hidden = np.bincount(owner[coverage > 0], minlength=MAX_OBJECTS + 1)[1:]
            if np.all(shown - hidden >= MIN_VISIBLE * inside):
                labels.append(label)
                owner[coverage > 0] = len(labels)
                shown -= hidden
                inside[len(labels) - 1] = shown[len(labels) - 1] = area
                _paint(rng, image, coverage, extent)
                break

    image *= mix(_gradient(rng, h, w), *rng.uniform((0.75, 1.0), (1.0, 1.2)).astype(np.float32))  # light from one side
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.8))
    image += rng.normal(0, rng.uniform(0, 7), image.shape)
    image = np.clip(image, 0, 255).round().astype(np.uint8)
    return image, [_annotate(label, owner == index) for index, label in enumerate(labels, 1)]


def _annotate(label: int, visible: np.ndarray) -> Annotation:
    """The annotation of an object from its visible part, (H·s, W·s) bool."""
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    x1, y1, x2, y2 = (edge / SUPERSAMPLING for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    h, w = (length // SUPERSAMPLING for length in visible.shape)
    mask = cv2.resize(visible.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA) >= 0.5
    return Annotation(label, (x1, y1, x2 - x1, y2 - y1), mask)

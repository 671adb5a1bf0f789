"""Draws the images of the scenes data set, with their annotations: material to pre-train a detector for photographs.

A class is one of seven shapes (blob, polygon, star, ring, rod, cluster, branch) with one of six textures (plain,
stripes, spots, cells, marble, core). An image has one to four kinds of objects, and several objects of a kind that
resemble each other in size and color, from 12 pixels to most of the image. They are shaded by one light, cast shadows,
and hide parts of each other, over backgrounds of patches, noise, gradients and strokes that are not annotated. Color is
independent of the class. Blur, noise, color casts and JPEG compression follow. One image in thirty has no object.

Boxes, areas and masks cover the *visible* part of an object inside the image, as in COCO. Every painted object is
annotated: an object is not placed where it would hide more than 60 % of another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from msda_plugin.tools.shape_images import Annotation, distant_color, mix, near_color, random_color, regular_polygon

SHAPES = ('blob', 'polygon', 'star', 'ring', 'rod', 'cluster', 'branch')
TEXTURES = ('plain', 'stripes', 'spots', 'cells', 'marble', 'core')
CLASSES = tuple(f'{texture} {shape}' for shape in SHAPES for texture in TEXTURES)
FORMAT = 1  # version of the drawing; increase it when the same seed draws other images

MIN_OBJECT = 12.0  # longer side of the smallest object, pixels
MAX_OBJECT = 0.85  # longer side of the largest object, relative to the shorter side of the image
EMPTY_IMAGES = 1 / 30  # fraction of images without an object
MAX_KINDS = 4
MAX_OBJECTS = 30
COVERED = 0.6  # maximum area of all objects before they hide each other, relative to the image
MIN_VISIBLE = 0.4  # minimum fraction of an object that other objects do not hide
MIN_INSIDE = 0.5  # minimum fraction of an object inside the image
MIN_PIXELS = 20  # minimum visible area, pixels
SUPERSAMPLING = 2  # masks are drawn at this multiple of the resolution
TEXTURE_SIDE = 128  # longer side of a texture before it is resized to its object, pixels

Polygons = list[np.ndarray]  # closed polygons (num_points, 2); even-odd rule


@dataclass(frozen=True)
class Kind:
    """Objects of an image that resemble each other."""

    label: int
    extent: float  # longer side, pixels
    colors: np.ndarray  # (2, 3) float32 RGB, 0-255
    stretch: float
    upright: bool
    opacity: float
    relief: float  # strength of the shading, 0: flat
    rim: float  # factor on the color along the outline, 1: none


# ---- outlines: groups of polygons around the origin, whose union is the object --------------------------------------
def _blob(rng: np.random.Generator, roughness: float = 0.12) -> np.ndarray:
    angle = np.arange(48) * (2 * np.pi / 48)
    orders = np.arange(2, 6)
    waves = rng.uniform(0, roughness, 4) / orders**0.5
    radius = 1 + waves @ np.cos(orders[:, None] * angle + rng.uniform(0, 2 * np.pi, (4, 1)))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _polygon(rng: np.random.Generator) -> np.ndarray:
    points = int(rng.integers(3, 7))
    angle = (np.arange(points) + rng.uniform(-0.22, 0.22, points)) * (2 * np.pi / points)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star(rng: np.random.Generator) -> np.ndarray:
    star = regular_polygon(2 * int(rng.integers(4, 10)))
    star[1::2] *= rng.uniform(0.35, 0.65)
    return star * rng.uniform(0.85, 1.1, (len(star), 1))


def _ring(rng: np.random.Generator) -> Polygons:
    outer = _blob(rng, 0.08)
    return [outer, outer * rng.uniform(0.4, 0.7) + rng.uniform(-0.1, 0.1, 2)]


def _rod(rng: np.random.Generator) -> np.ndarray:
    """A bent bar of varying width."""
    t = np.linspace(-1, 1, 16)
    bend, width = rng.uniform(0, 0.7), rng.uniform(0.12, 0.32)
    widths = width * (1 + rng.uniform(-0.4, 0.4) * t) * np.sqrt(np.clip(1 - t**6, 0, 1))
    spine = np.stack([t, bend * t**2], axis=1)
    normal = np.stack([-2 * bend * t, np.ones_like(t)], axis=1)
    side = widths[:, None] * normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return np.concatenate([spine + side, (spine - side)[::-1]])


def _cluster(rng: np.random.Generator) -> list[Polygons]:
    """A body with smaller parts around it."""
    groups = [[_blob(rng) * (1.0, rng.uniform(0.5, 1.0))]]
    for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(2, 7))):
        direction = np.array([np.cos(angle), np.sin(angle)])
        part = _blob(rng) * (rng.uniform(0.25, 0.6), rng.uniform(0.15, 0.4))
        turn = np.array([direction, direction[::-1] * (-1, 1)])
        groups.append([part @ turn + direction * rng.uniform(0.6, 1.1)])
    return groups


def _branch(rng: np.random.Generator) -> list[Polygons]:
    """A tree: the attractor of an iterated function system that begins with a tapering bar."""
    bar = np.array([[-0.09, 0], [0.09, 0], [0.055, 1], [-0.055, 1]])
    maps = []
    for side in (-1, 1, 0)[: int(rng.integers(2, 4))]:
        angle = side * rng.uniform(0.35, 0.9) + rng.uniform(-0.15, 0.15)
        scale = rng.uniform(0.5, 0.75)
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        maps.append((np.array([[cos, sin], [-sin, cos]]), np.array([0, rng.uniform(0.6, 1.0)])))
    level, groups = [bar], [[bar]]
    for _ in range(3):
        level = [polygon @ turn + shift for polygon in level for turn, shift in maps]
        groups += [[polygon] for polygon in level]
    return groups


def _outline(rng: np.random.Generator, shape: str) -> list[Polygons]:
    if shape == 'cluster':
        return _cluster(rng)
    if shape == 'branch':
        return _branch(rng)
    if shape == 'ring':
        return [_ring(rng)]
    return [[dict(blob=_blob, polygon=_polygon, star=_star, rod=_rod)[shape](rng)]]


def _place(
    rng: np.random.Generator, groups: list[Polygons], kind: Kind, extent: float, center: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Draw an outline, stretched and rotated, with longer side ``extent`` around ``center`` (x, y), pixels.

    Returns:
        Coverage (h, w) float32 from 0 to 1, and the position x, y of its upper left pixel, which may be negative.
    """
    angle = rng.normal(0, 0.2) if kind.upright else rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * np.array([[1.0], [kind.stretch * rng.uniform(0.9, 1.1)]])
    every = np.concatenate([polygon for group in groups for polygon in group]) @ turn
    low, high = every.min(axis=0), every.max(axis=0)
    scale = extent / (high - low).max()
    corner = np.floor(center - (high - low) * scale / 2).astype(int) - 1
    w, h = np.ceil((high - low) * scale).astype(int) + 3
    shift = center - corner - (low + high) / 2 * scale
    drawn = np.zeros((h * SUPERSAMPLING, w * SUPERSAMPLING), np.uint8)
    for group in groups:  # fillPoly takes fixed-point numbers, with pixel centers at integers
        fixed = [
            np.rint((polygon @ turn * scale + shift) * (SUPERSAMPLING * 16) - 8).astype(np.int32) for polygon in group
        ]
        cv2.fillPoly(drawn, fixed, 255, shift=4)
    coverage = cv2.resize(drawn, (int(w), int(h)), interpolation=cv2.INTER_AREA)
    return coverage.astype(np.float32) / 255, int(corner[0]), int(corner[1])


# ---- textures: (h, w) weights from 0 to 1 that mix two colors -------------------------------------------------------
def _noise(rng: np.random.Generator, h: int, w: int, cells: float, octaves: int = 3) -> np.ndarray:
    """Smooth noise from about 0 to 1, with ``cells`` bumps along the longer side, halved in each octave."""
    field, weight = np.zeros((h, w), np.float32), 0.0
    for octave in range(octaves):
        count = cells * 2**octave / max(h, w)
        rows, columns = max(2, round(h * count)), max(2, round(w * count))
        coarse = rng.random((rows, columns), dtype=np.float32)
        field += cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC) * 0.6**octave
        weight += 0.6**octave
    return np.clip((field / weight - 0.5) * 1.6 + 0.5, 0, 1)


def _waves(rng: np.random.Generator, h: int, w: int, periods: float) -> tuple[np.ndarray, np.ndarray]:
    """Phases (h, w) along two perpendicular directions, slightly warped."""
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:h, :w].astype(np.float32) * np.float32(2 * np.pi * periods / max(h, w))
    warp = 4 * rng.uniform(0, 1) * _noise(rng, h, w, 3, 1)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin + warp, y * cos - x * sin + warp


def _stripes(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    u, _ = _waves(rng, h, w, rng.uniform(2.5, 7))
    return np.clip(0.5 + rng.uniform(0.7, 3) * np.sin(u), 0, 1)


def _spots(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    u, v = _waves(rng, h, w, rng.uniform(2.5, 6))
    return np.clip(rng.uniform(1.5, 4) * (np.cos(u) + np.cos(v) - rng.uniform(0.3, 0.9)), 0, 1)


def _cells(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Patches of different brightness: a Voronoi diagram."""
    points = rng.uniform((0, 0), (w, h), (int(rng.integers(8, 24)), 2))
    y, x = np.mgrid[:h, :w].astype(np.float32)
    distance = np.stack([(x - px) ** 2 + (y - py) ** 2 for px, py in points.astype(np.float32)])
    return rng.random(len(points), dtype=np.float32)[distance.argmin(axis=0)]


def _marble(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    return np.clip(2.2 * (_noise(rng, h, w, rng.uniform(3, 8)) - 0.5) + 0.5, 0, 1)


def _gradient(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    u = np.add.outer(np.linspace(-1, 1, h) * np.sin(angle), np.linspace(-1, 1, w) * np.cos(angle))
    return (u / (abs(np.sin(angle)) + abs(np.cos(angle))) / 2 + 0.5).astype(np.float32)


PATTERNS = dict(plain=_gradient, stripes=_stripes, spots=_spots, cells=_cells, marble=_marble)


def _texture(rng: np.random.Generator, name: str, depth: np.ndarray) -> np.ndarray:
    """The texture of an object, from its relative distance to the outline, (h, w) from 0 to 1."""
    h, w = depth.shape
    if name == 'core':
        edge = rng.uniform(0.3, 0.6)
        return np.clip((depth + 0.15 * (_noise(rng, h, w, 4, 2) - 0.5) - edge) * 8, 0, 1)
    scale = min(1.0, TEXTURE_SIDE / max(h, w))
    small = PATTERNS[name](rng, max(2, round(h * scale)), max(2, round(w * scale)))
    if name == 'plain':
        small = 0.35 * small
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR) if scale < 1 else small


# ---- background -----------------------------------------------------------------------------------------------------
def _layer(rng: np.random.Generator, h: int, w: int, color: np.ndarray, contrast: float) -> np.ndarray:
    name = list(PATTERNS)[rng.choice(len(PATTERNS), p=(0.3, 0.1, 0.1, 0.15, 0.35))]
    image = mix(PATTERNS[name](rng, h // 2, w // 2), color, near_color(rng, color, contrast))
    return cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)


def _background(rng: np.random.Generator, h: int, w: int, saturation: float) -> np.ndarray:
    base = random_color(rng, (0.0, 0.7 * saturation))
    image = _layer(rng, h, w, base, rng.uniform(5, 70))
    if rng.random() < 0.25:  # even, as under a microscope
        return image
    for _ in range(int(rng.integers(0, 4))):  # patches with irregular borders
        border = _noise(rng, h // 2, w // 2, rng.uniform(1.5, 4), 2) + 0.8 * _gradient(rng, h // 2, w // 2)
        border = cv2.resize(border, (w, h), interpolation=cv2.INTER_LINEAR)
        weight = np.clip((border - rng.uniform(0.6, 1.3)) * rng.choice((4, 60)), 0, 1)[..., None]
        color = near_color(rng, base, 120) if rng.random() < 0.6 else random_color(rng, (0.0, saturation))
        image += weight * (_layer(rng, h, w, color, rng.uniform(5, 60)) - image)
    for _ in range(int(rng.integers(0, 12)) if rng.random() < 0.6 else 0):  # blades, cracks, wires
        start = rng.uniform((0, 0), (w, h))
        steps = rng.normal(0, 0.12 * min(h, w), 2) + rng.normal(0, 0.03 * min(h, w), (int(rng.integers(3, 9)), 2))
        line = np.rint(np.cumsum(np.concatenate([start[None], steps]), axis=0) * 16).astype(np.int32)
        color = near_color(rng, base, 110).tolist()
        cv2.polylines(image, [line], False, color, int(rng.integers(1, 4)), cv2.LINE_8, 4)
    if rng.random() < 0.6:  # gravel, grass, fabric
        fine = _noise(rng, h, w, rng.uniform(15, 80), 2) - 0.5
        image += rng.uniform(10, 70) * fine[..., None]
    return image


# ---- objects --------------------------------------------------------------------------------------------------------
def _kind(rng: np.random.Generator, background: np.ndarray, saturation: float) -> Kind:
    side = min(background.shape[:2])
    label = int(rng.integers(len(CLASSES)))
    first = distant_color(rng, background.mean(axis=(0, 1)), rng.uniform(35, 130), (0.0, saturation))
    second = distant_color(rng, first, rng.uniform(50, 150), (0.0, saturation))
    return Kind(
        label=label,
        extent=float(np.exp(rng.uniform(np.log(MIN_OBJECT), np.log(MAX_OBJECT * side)))),
        colors=np.stack([first, second]),
        stretch=rng.uniform(0.5, 1.0),
        upright=rng.random() < 0.4,
        opacity=1.0 if rng.random() < 0.8 else rng.uniform(0.65, 0.95),
        relief=rng.uniform(0.2, 1.0) if rng.random() < 0.7 else 0.0,
        rim=rng.choice((0.5, 0.7, 1.35)) if rng.random() < 0.35 else 1.0,
    )


def _paint(
    rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray, depth: np.ndarray, kind: Kind, light: np.ndarray
) -> None:
    """Paint an object on the part ``image`` (h, w, 3) of the image."""
    h, w = alpha.shape
    texture = TEXTURES[kind.label % len(TEXTURES)]
    first, second = (near_color(rng, color, 22) for color in kind.colors)
    fill = mix(_texture(rng, texture, depth), first, second)
    if rng.random() < 0.5 and min(h, w) > 16:
        fill = fill + 30 * (_noise(rng, h, w, max(h, w) / 6, 2)[..., None] - 0.5)
    if kind.relief:
        height = cv2.GaussianBlur(np.sqrt(depth), (0, 0), max(0.6, 0.04 * max(h, w)))
        gx, gy = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125), cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
        shade = (gx * light[0] + gy * light[1]) * np.float32(0.25 * min(h, w))
        fill = fill * np.clip(1 + kind.relief * np.clip(shade, -0.7, 0.7), 0.2, 1.8)[..., None]
    if kind.rim != 1:
        fill = fill * np.where(depth < rng.uniform(0.08, 0.2), np.float32(kind.rim), np.float32(1))[..., None]
    image += (alpha * np.float32(kind.opacity))[..., None] * (np.clip(fill, 0, 255) - image)


def _cast_shadow(image: np.ndarray, alpha: np.ndarray, x: int, y: int, extent: float, shadow: np.ndarray) -> None:
    """Darken ``image`` next to an object at (x, y), on the side away from the light."""
    margin = max(2, round(extent * 0.15))
    soft = cv2.copyMakeBorder(alpha, margin, margin, margin, margin, cv2.BORDER_CONSTANT)
    soft = cv2.GaussianBlur(soft, (0, 0), max(0.8, 0.04 * extent)) * shadow[2]
    left, top = (int(round(at - margin + extent * part)) for at, part in ((x, shadow[0]), (y, shadow[1])))
    h, w = image.shape[:2]
    part = np.s_[max(0, top) : max(0, min(h, top + soft.shape[0])), max(0, left) : max(0, min(w, left + soft.shape[1]))]
    rows, columns = part
    image[part] *= (1 - soft[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left])[..., None]


def _develop(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light, lens, sensor and compression; returns uint8."""
    h, w = image.shape[:2]
    low, high = rng.uniform(0.55, 1.0), rng.uniform(1.0, 1.3)
    image *= mix(_gradient(rng, h, w), np.float32([low]), np.float32([high]))
    image *= rng.uniform(0.85, 1.15, 3).astype(np.float32)
    image = 255 * np.power(np.clip(image / 255, 0, 1), np.float32(np.exp(rng.uniform(-0.4, 0.4))))
    choice = rng.random()
    if choice < 0.45:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    elif choice < 0.5:
        length = int(rng.integers(2, 6))
        image = cv2.blur(image, (length, 1) if rng.random() < 0.5 else (1, length))
    if rng.random() < 0.08:
        image = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    if rng.random() < 0.6:
        grain = rng.standard_normal((h, w, 1), dtype=np.float32) * np.float32(rng.uniform(1, 10))
        image = image + grain * rng.uniform(0.7, 1.3, 3).astype(np.float32)
    image = np.clip(image, 0, 255).round().astype(np.uint8)
    if rng.random() < 0.4:
        _, data = cv2.imencode('.jpg', image, (cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))))
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return image


# ---- one image ------------------------------------------------------------------------------------------------------
def _sizes(
    rng: np.random.Generator, h: int, w: int, background: np.ndarray, saturation: float
) -> list[tuple[float, Kind]]:
    """Longer side and kind of each object to place, the largest first: small ones in front are not hidden."""
    if rng.random() < EMPTY_IMAGES:
        return []
    wanted, room = [], COVERED * h * w
    for _ in range(int(rng.integers(1, MAX_KINDS + 1))):
        kind = _kind(rng, background, saturation)
        for _ in range(int(np.exp(rng.uniform(0, np.log(20))))):
            extent = float(np.clip(kind.extent * np.exp(rng.normal(0, 0.2)), MIN_OBJECT, MAX_OBJECT * min(h, w)))
            room -= 0.4 * extent**2
            if wanted and (room < 0 or len(wanted) == MAX_OBJECTS):
                break
            wanted.append((extent, kind))
    order = np.argsort([-extent * np.exp(rng.normal(0, 0.3)) for extent, _ in wanted], kind='stable')
    return [wanted[index] for index in order]


def draw_image(seed: int | Sequence[int], size: tuple[int, int] = (320, 320)) -> tuple[np.ndarray, list[Annotation]]:
    """Draw one image.

    Args:
        seed: Seed for numpy's ``default_rng``.
        size: (width, height), pixels.

    Returns:
        The image, (H, W, 3) uint8 RGB, and its annotations in the order of painting.
    """
    rng = np.random.default_rng(seed)
    w, h = size
    saturation = rng.uniform(0.15, 1.0)
    image = _background(rng, h, w, saturation)
    light = rng.normal(0, 1, 2)
    light = (light / np.linalg.norm(light)).astype(np.float32)
    shadow = np.array([*(-light * rng.uniform(0.02, 0.12)), rng.uniform(0.15, 0.6)], np.float32)
    shadows = rng.random() < 0.5

    owner = np.zeros((h, w), np.uint8)  # visible object 1, 2, …; 0: background
    labels: list[int] = []
    inside, shown = np.zeros((2, MAX_OBJECTS))  # pixels of each object inside the image; visible ones
    for extent, kind in _sizes(rng, h, w, image, saturation):
        groups = _outline(rng, SHAPES[kind.label // len(TEXTURES)])
        for _ in range(6):  # attempts to find a place
            coverage, x, y = _place(rng, groups, kind, extent, rng.uniform((0, 0), (w, h)))
            full_h, full_w = coverage.shape
            rows, columns = slice(max(0, -y), min(full_h, h - y)), slice(max(0, -x), min(full_w, w - x))
            alpha = coverage[rows, columns]
            part = np.s_[y + rows.start : y + rows.stop, x + columns.start : x + columns.stop]
            covered = alpha >= 0.5
            area = np.count_nonzero(covered)
            if area < max(MIN_PIXELS, MIN_INSIDE * np.count_nonzero(coverage >= 0.5)):
                continue
            hidden = np.bincount(owner[part][covered], minlength=MAX_OBJECTS + 1)[1:]
            if np.any(shown - hidden < np.maximum(MIN_VISIBLE * inside, MIN_PIXELS * (inside > 0))):
                continue
            labels.append(kind.label)
            owner[part][covered] = len(labels)
            shown -= hidden
            inside[len(labels) - 1] = shown[len(labels) - 1] = area
            # Relative to the whole object, so that the border of the image is no outline.
            depth = cv2.distanceTransform((coverage >= 0.5).astype(np.uint8), cv2.DIST_L2, 3)
            depth = depth[rows, columns] / max(1.0, float(depth.max()))
            if shadows:
                _cast_shadow(image, alpha, part[1].start, part[0].start, extent, shadow)
            _paint(rng, image[part], alpha, depth, kind, light)
            break

    return _develop(rng, image), [_annotate(label, owner == index) for index, label in enumerate(labels, 1)]


def _annotate(label: int, visible: np.ndarray) -> Annotation:
    """The annotation of an object from its visible part, (H, W) bool."""
    x, y, w, h = cv2.boundingRect(visible.view(np.uint8))
    return Annotation(label, (x, y, w, h), visible)

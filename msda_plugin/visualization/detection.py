"""Draws boxes and masks on images, and sheets of images with ground truth and predictions side by side.

Images are (H, W, 3) uint8 RGB; boxes are (N, 4), x1 y1 x2 y2 in image pixels; labels are (N,), indices of the class
names; scores are (N,), 0-1.
"""

import colorsys
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from msda_plugin.files import atomic_write

# Clearly distinct colors; further classes get hues spaced by the golden ratio.
BASE_COLORS = (
    (255, 89, 94),
    (25, 170, 255),
    (255, 202, 58),
    (110, 220, 90),
    (190, 110, 255),
    (255, 146, 43),
    (0, 210, 190),
    (255, 120, 200),
    (160, 180, 60),
    (120, 140, 255),
)
PAPER, INK = (255, 255, 255), (25, 25, 25)
TINT = 0.5  # opacity of masks
GAP = 12  # between the tiles of a sheet, pixels


def class_colors(num_classes: int) -> np.ndarray:
    """One bright RGB color per class, (num_classes, 3) uint8. A class index always has the same color."""
    colors = list(BASE_COLORS[:num_classes])
    for index in range(len(colors), num_classes):
        hue, value = index * 0.618034 % 1, (1.0, 0.85, 0.7)[index % 3]
        colors.append(tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.65, value)))
    return np.array(colors, np.uint8).reshape(num_classes, 3)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    masks: np.ndarray | None = None,
    longer_side: int | None = None,
    caption: str = '',
) -> np.ndarray:
    """Draw boxes, each with a tag of its class and score, and tint masks in the colors of their classes.

    The highest-scoring box is drawn on top. A tag that would cover another one is omitted; the color of the box still
    shows the class.

    Args:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4), x1 y1 x2 y2, pixels of ``image``.
        labels: (N,) integers from 0 to ``len(class_names) - 1``.
        class_names: Name of each label.
        scores: (N,), 0-1; None: tags without scores.
        masks: (N, H, W) bool; None: boxes alone.
        longer_side: Resize the image to this longer side (pixels) before drawing, so that lines and text are sharp on
            small images; None: do not resize.
        caption: Text in a white band below the image, such as :func:`score_caption`; '' for no band.

    Returns:
        The image with boxes, (H', W', 3) uint8, RGB.

    Raises:
        ValueError: If an array has the wrong shape, dtype or length, or a label has no class name.
    """
    boxes, labels = np.asarray(boxes, float).reshape(-1, 4), np.asarray(labels, int)
    scores = None if scores is None else np.asarray(scores, float)
    _check(image, boxes, labels, class_names, scores, masks)
    scale = longer_side / max(image.shape[:2]) if longer_side else 1.0
    # By score. Without scores, large boxes first, so they do not hide small ones.
    order = np.argsort(scores if scores is not None else -np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind='stable')
    canvas = Image.fromarray(image if masks is None else _tint(image, masks, labels, len(class_names), order))
    if scale != 1.0:
        sides = (max(1, round(image.shape[axis] * scale)) for axis in (1, 0))
        canvas = canvas.resize(tuple(sides), Image.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    width = max(1, round(max(canvas.size) / 200))
    font = _font(max(11, round(max(canvas.size) / 30)))
    colors = [tuple(color) for color in class_colors(len(class_names)).tolist()]
    edges = [_edges(box * scale, canvas.size) for box in boxes]
    for index in order:
        x1, y1, x2, y2 = edges[index]
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=INK, width=width + 2)  # visible on any background
        draw.rectangle((x1, y1, x2, y2), outline=colors[labels[index]], width=width)
    taken: list[tuple[float, float, float, float]] = []
    for index in order[::-1]:
        text = class_names[labels[index]] + (f' {scores[index]:.2f}' if scores is not None else '')
        place = _free_place(edges[index], _text_size(font, text), canvas.size, taken)
        if place is not None:
            taken.append(place)
            _tag(draw, place, text, font, colors[labels[index]])
    return np.array(_with_caption(canvas, caption, font) if caption else canvas)


def score_caption(scores: Sequence[float], score_thr: float) -> str:
    """What the drawn boxes are: ``'score ≥ 0.3'``; if none is, ``'no score ≥ 0.3, highest 0.12'``.

    Args:
        scores: (N,), 0-1, of all detections, before the threshold.
        score_thr: Minimum score of the drawn boxes, 0-1.
    """
    highest = max(map(float, scores), default=None)
    if highest is None:
        return 'no detections'
    return f'score ≥ {score_thr:g}' if highest >= score_thr else f'no score ≥ {score_thr:g}, highest {highest:.3g}'


def draw_sheet(
    images: Sequence[np.ndarray],
    truths: Sequence[tuple],
    predictions: Sequence[tuple],
    class_names: Sequence[str],
    *,
    tile: int = 384,
    columns: int = 2,
    score_thr: float | None = None,
) -> np.ndarray:
    """Draw a sheet of pairs: each image with its ground truth, and next to it with the predictions.

    Args:
        images: Each (H, W, 3) uint8, RGB; sizes can differ.
        truths: (boxes, labels) of each image, as in `draw_boxes`.
        predictions: (boxes, labels, scores) of each image.
        class_names: Name of each label; the legend shows the labels on the sheet.
        tile: Longer side of an image on the sheet, pixels.
        columns: Pairs per row.
        score_thr: Minimum score of the drawn predictions, 0-1. The sheet states it, and the highest score below images
            where none reaches it. None: all predictions are drawn.

    Returns:
        The sheet, (H', W', 3) uint8, RGB.

    Raises:
        ValueError: If there is no image, the sequences differ in length, or `draw_boxes` refuses an array.
    """
    if not images or not len(images) == len(truths) == len(predictions):
        raise ValueError(
            'expected at least one image, with ground truth and predictions for each; got '
            f'{len(images)} images, {len(truths)} ground truths, {len(predictions)} predictions'
        )
    captions = [''] * len(images)
    if score_thr is not None:
        kept = [np.asarray(scores) >= score_thr for *_, scores in predictions]
        captions = [
            '' if keep.any() else score_caption(scores, score_thr)
            for keep, (*_, scores) in zip(kept, predictions, strict=True)
        ]
        predictions = [
            tuple(np.asarray(array)[keep] for array in prediction)
            for keep, prediction in zip(kept, predictions, strict=True)
        ]
    pairs = [
        (
            draw_boxes(image, *truth, class_names, longer_side=tile),
            draw_boxes(image, *prediction[:2], class_names, prediction[2], longer_side=tile, caption=caption),
        )
        for image, truth, prediction, caption in zip(images, truths, predictions, captions, strict=True)
    ]
    columns = min(columns, len(pairs))
    cell_w = max(left.shape[1] for left, _ in pairs)
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(right.shape[0] for _, right in row) for row in rows]  # with captions
    font = _font(max(12, round(tile / 22)))
    line = round(font.size * 1.7)
    pair_w = 2 * cell_w + GAP // 3
    sheet_w = columns * pair_w + (columns + 1) * GAP
    legend = _legend(
        font,
        class_names,
        sorted({int(label) for labels in (*truths, *predictions) for label in labels[1]}),
        sheet_w - 2 * GAP,
    )
    sheet = Image.new('RGB', (sheet_w, sum(heights) + (len(rows) + 1) * GAP + line + legend.height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = GAP
    predicted = 'predicted' if score_thr is None else f'predicted, score ≥ {score_thr:g}'
    for column in range(columns):
        for side, header in enumerate(('true', predicted)):
            x = GAP + column * (pair_w + GAP) + side * (cell_w + GAP // 3)
            draw.text((x + cell_w // 2, y), header, INK, font, anchor='ma')
    y += line
    for row, height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            for side, drawn in enumerate(pair):
                x = GAP + column * (pair_w + GAP) + side * (cell_w + GAP // 3)
                sheet.paste(Image.fromarray(drawn), (x, y))
        y += height + GAP
    sheet.paste(legend, (GAP, y - GAP // 2))
    return np.array(sheet)


def draw_contact_sheet(
    images: Sequence[np.ndarray],
    truths: Sequence[tuple],
    class_names: Sequence[str],
    captions: Sequence[str],
    *,
    tile: int = 320,
    columns: int = 4,
) -> np.ndarray:
    """Draw a sheet of images with their boxes, each with a caption below.

    Args:
        images: Each (H, W, 3) uint8, RGB; sizes can differ.
        truths: (boxes, labels) of each image, as in `draw_boxes`.
        class_names: Name of each label; the legend shows the labels on the sheet.
        captions: Text below each image.
        tile: Longer side of an image on the sheet, pixels.
        columns: Images per row.

    Returns:
        The sheet, (H', W', 3) uint8, RGB.

    Raises:
        ValueError: If there is no image, the sequences differ in length, or `draw_boxes` refuses an array.
    """
    if not images or not len(images) == len(truths) == len(captions):
        raise ValueError(
            'expected at least one image, with boxes and a caption for each; got '
            f'{len(images)} images, {len(truths)} boxes, {len(captions)} captions'
        )
    tiles = [
        draw_boxes(image, *truth, class_names, longer_side=tile, caption=caption)
        for image, truth, caption in zip(images, truths, captions, strict=True)
    ]
    columns = min(columns, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(drawn.shape[0] for drawn in row) for row in rows]
    width = columns * (tile + GAP) + GAP
    labels = sorted({int(label) for _, labels in truths for label in labels})
    legend = _legend(_font(max(12, round(tile / 22))), class_names, labels, width - 2 * GAP)
    sheet = Image.new('RGB', (width, sum(heights) + (len(rows) + 1) * GAP + legend.height), PAPER)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, drawn in enumerate(row):
            sheet.paste(Image.fromarray(drawn), (GAP + column * (tile + GAP), y))
        y += height + GAP
    sheet.paste(legend, (GAP, y - GAP // 2))
    return np.array(sheet)


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write an image, (H, W, 3) uint8 RGB, as a PNG file. The file is replaced atomically."""
    with atomic_write(path) as unfinished:
        Image.fromarray(image).save(unfinished, format='PNG')


def _check(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None,
    masks: np.ndarray | None,
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'image must be (H, W, 3) uint8, got {image.shape} {image.dtype}')
    lengths = [len(boxes), len(labels)] + ([] if scores is None else [len(scores)])
    if len(set(lengths)) > 1:
        raise ValueError(f'boxes, labels (and scores) must have equal lengths, got {", ".join(map(str, lengths))}')
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f'labels must be from 0 to {len(class_names) - 1}, since there are {len(class_names)} class names, got '
            f'{labels.min()} to {labels.max()}'
        )
    if masks is not None and (masks.dtype != bool or masks.shape != (len(boxes), *image.shape[:2])):
        raise ValueError(
            f'masks must be {(len(boxes), *image.shape[:2])} bool, one at the size of the image for each box; got '
            f'{masks.shape} {masks.dtype}'
        )


def _tint(
    image: np.ndarray, masks: np.ndarray, labels: np.ndarray, num_classes: int, order: Sequence[int]
) -> np.ndarray:
    """The image with masks (N, H, W) in the colors of their labels (N,); the last of the order covers others."""
    colors, tinted = class_colors(num_classes), image.copy()
    for index in order:
        mask = masks[index]
        tinted[mask] = np.round((1 - TINT) * image[mask] + TINT * colors[labels[index]])
    return tinted


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, from matplotlib's data."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')), size)


def _text_size(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    return round(font.getlength(text)) + 6, round(font.size * 1.25)


def _edges(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round and clip a box to an image of ``size`` (width, height), at least one pixel large."""
    x1, y1, x2, y2 = np.nan_to_num(box).round().astype(int).tolist()
    x1, y1 = min(max(x1, 0), size[0] - 2), min(max(y1, 0), size[1] - 2)
    return x1, y1, min(max(x2 - 1, x1 + 1), size[0] - 1), min(max(y2 - 1, y1 + 1), size[1] - 1)


def _free_place(
    edges: Sequence[int], text: tuple[int, int], size: tuple[int, int], taken: Sequence[tuple]
) -> tuple[int, int, int, int] | None:
    """A free place for a tag: above, below, next to or inside the box; None if there is none."""
    x1, y1, x2, y2 = edges
    w, h = text
    above, below, right_aligned = y1 - h, y2 + 1, x2 + 1 - w
    for left, top in (
        (x1, above),
        (right_aligned, above),
        (x1, below),
        (right_aligned, below),
        (x2 + 2, y1),
        (x1 - w - 1, y1),
        (x1, y1),
    ):
        left = min(max(left, 0), size[0] - w)
        place = (left, top, left + w, top + h)
        free = all(
            place[2] <= other[0] or other[2] <= place[0] or place[3] <= other[1] or other[3] <= place[1]
            for other in taken
        )
        if free and top >= 0 and top + h <= size[1]:
            return place
    return None


def _with_caption(image: Image.Image, caption: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The image above a white band with the caption, in as many lines as its width needs."""
    lines = ['']
    for word in caption.split():
        longer = f'{lines[-1]} {word}'.strip()
        if lines[-1] and font.getlength(longer) > image.width - 6:
            lines.append(word)
        else:
            lines[-1] = longer
    line = round(font.size * 1.4)
    canvas = Image.new('RGB', (image.width, image.height + line * len(lines)), PAPER)
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        draw.text((3, image.height + line * (number + 0.5)), text, INK, font, anchor='lm')
    return canvas


def _tag(
    draw: ImageDraw.ImageDraw,
    place: Sequence[int],
    text: str,
    font: ImageFont.FreeTypeFont,
    color: tuple[int, int, int],
) -> None:
    x1, y1, x2, y2 = place
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
    bright = np.dot(color, (0.299, 0.587, 0.114)) > 120
    draw.text((x1 + 3, (y1 + y2) / 2), text, INK if bright else PAPER, font, anchor='lm')


def _legend(font: ImageFont.FreeTypeFont, class_names: Sequence[str], labels: Sequence[int], width: int) -> Image.Image:
    """Color and name of each label, in lines of at most ``width``."""
    colors = class_colors(len(class_names))
    side, line = round(font.size * 0.9), round(font.size * 1.7)
    places, x, y = [], 0, 0
    for label in labels:
        length = side + 6 + round(font.getlength(class_names[label])) + 2 * side
        if x and x + length > width:
            x, y = 0, y + line
        places.append((x, y))
        x += length
    canvas = Image.new('RGB', (width, y + line), PAPER)
    draw = ImageDraw.Draw(canvas)
    for label, (x, y) in zip(labels, places, strict=True):
        top = y + (line - side) // 2
        draw.rectangle((x, top, x + side, top + side), fill=tuple(colors[label].tolist()), outline=INK)
        draw.text((x + side + 6, y + line / 2), class_names[label], INK, font, anchor='lm')
    return canvas

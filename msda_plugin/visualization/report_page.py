"""A self-contained HTML page on the accuracy and the mistakes of a detector.

The page has no script and loads nothing. Names and paths, which come from files, are escaped by Jinja.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jinja2
import numpy as np

from msda_plugin.engine.detection_analysis import IOU_THR, LOCATED, MAX_DETECTIONS, Analysis, DetectedImage, Mistake
from msda_plugin.engine.messages import counted
from msda_plugin.visualization.data_uri import data_uri
from msda_plugin.visualization.detection import class_colors
from msda_plugin.visualization.precision_recall import draw_precision_recall

TILE = 480  # longer side of an embedded crop, pixels
CURVES_SIDE = 1600
RIGHT, WRONG = '40, 110, 220', '230, 60, 40'  # RGB in the confusion matrix
MAX_COLORED = 10  # curves with a color of their own
MAX_MATRIX = 100  # classes in the confusion matrix
MAX_CONFUSIONS = 10  # pairs of classes in the list
APS = ('ap', 'ap50', 'ap75')


def report_page(
    analysis: Analysis,
    images: Sequence[DetectedImage],
    class_names: Sequence[str],
    read_image: Callable[[str], np.ndarray],
    *,
    title: str,
    facts: Mapping[str, str],
    curves: np.ndarray | None = None,
) -> str:
    """The HTML page as a string.

    Args:
        analysis: Numbers and mistakes.
        images: The images that were analyzed.
        class_names: Name of each label.
        read_image: Reads a path of ``images`` as (H, W, 3) uint8, RGB. An image that raises an error is left blank.
        title: Title of the page.
        facts: Settings to list: name -> value.
        curves: Figure of the training curves, (H, W, 3) uint8, RGB; None: the page has no such section.
    """
    colors = _curve_colors(analysis)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters['number'] = lambda value: '–' if math.isnan(value) else f'{value:.3f}'
    names = list(class_names)
    return environment.from_string(PAGE).render(
        title=title,
        facts=facts,
        iou_thr=IOU_THR,
        located=LOCATED,
        max_detections=MAX_DETECTIONS,
        score_thr=f'{analysis.score_thr:.2f}',
        has_best_f1=analysis.has_best_f1,
        num_right=int(analysis.hits.sum()),
        num_images=len(images),
        data=f'{counted(len(images), "image")} with {counted(int(analysis.num_boxes.sum()), "box", "boxes")}',
        num_empty=sum(not (~image.ignored).any() for image in images),
        num_detections=sum(len(image.found) for image in images),
        mean=_mean_row(analysis),
        classes=_class_rows(analysis, names, colors),
        some_gray=len(colors) < np.count_nonzero(analysis.num_boxes),
        precision_recall=data_uri(
            draw_precision_recall(analysis.recalls, analysis.precisions, colors), longer_side=CURVES_SIDE, kind='PNG'
        )
        if analysis.num_boxes.any()
        else None,
        matrix=_matrix(analysis, names),
        confusions=_confusions(analysis, names),
        false_positives=[
            _tile(mistake, images[mistake.image], names, analysis.score_thr, read_image, missed=False)
            for mistake in analysis.false_positives
        ],
        misses=[
            _tile(mistake, images[mistake.image], names, analysis.score_thr, read_image, missed=True)
            for mistake in analysis.misses
        ],
        curves=None if curves is None else data_uri(curves, longer_side=CURVES_SIDE, kind='PNG'),
    )


# ---- numbers --------------------------------------------------------------------------------------------------------
def _curve_colors(analysis: Analysis) -> dict[int, tuple[int, int, int]]:
    """Colors of the classes with the lowest and the highest AP50, half each; of all if there are few."""
    known = np.flatnonzero(analysis.num_boxes)
    if len(known) > MAX_COLORED:
        ranked = known[np.argsort(analysis.ap50[known], kind='stable')]
        known = np.sort(np.concatenate([ranked[: MAX_COLORED // 2], ranked[-MAX_COLORED // 2 :]]))
    return {int(label): tuple(color.tolist()) for label, color in zip(known, class_colors(len(known)), strict=True)}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _class_rows(analysis: Analysis, names: Sequence[str], colors: Mapping[int, tuple]) -> list[dict]:
    return [
        dict(
            name=name,
            color='#{:02x}{:02x}{:02x}'.format(*colors[label]) if label in colors else None,
            images=int(analysis.num_images[label]),
            boxes=int(analysis.num_boxes[label]),
            ap=float(analysis.ap[label]),
            ap50=float(analysis.ap50[label]),
            ap75=float(analysis.ap75[label]),
            precision=_ratio(analysis.hits[label], analysis.hits[label] + analysis.false_alarms[label]),
            recall=_ratio(analysis.hits[label], analysis.num_boxes[label]),
            hits=int(analysis.hits[label]),
            false_alarms=int(analysis.false_alarms[label]),
            missed=int(analysis.num_boxes[label] - analysis.hits[label]),
        )
        for label, name in enumerate(names)
    ]


def _mean_row(analysis: Analysis) -> dict:
    """AP: means over classes with boxes; counts, precision and recall: of all boxes."""
    known = analysis.num_boxes > 0
    hits, false_alarms, boxes = (
        int(numbers.sum()) for numbers in (analysis.hits, analysis.false_alarms, analysis.num_boxes)
    )
    return dict(
        boxes=boxes,
        **{name: float(getattr(analysis, name)[known].mean()) if known.any() else math.nan for name in APS},
        precision=_ratio(hits, hits + false_alarms),
        recall=_ratio(hits, boxes),
        hits=hits,
        false_alarms=false_alarms,
        missed=boxes - hits,
    )


def _matrix(analysis: Analysis, names: Sequence[str]) -> dict:
    """Rows and columns of the classes with the most errors, and of no class; cells with their count and color."""
    confusion = analysis.confusion
    errors = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * np.diag(confusion)
    shown = np.sort(np.argsort(-errors[:-1], kind='stable')[:MAX_MATRIX])
    order = [*shown.tolist(), len(names)]
    rows = []
    for row in order:
        cells = []
        for column in order:
            count = int(confusion[row, column])
            # Of the objects of the class; for detections without an object, of the detections of the class.
            share = _ratio(count, confusion[row].sum() if row < len(names) else confusion[:, column].sum())
            cells.append(
                dict(
                    count=count,
                    share=f'{share:.0%}',
                    color=f'rgba({RIGHT if row == column else WRONG}, {0.08 + 0.82 * share:.2f})' if count else None,
                    title=f'{_named(names, row, "no object")} → {_named(names, column, "missed")}',
                )
            )
        rows.append(dict(name=_named(names, row, 'no object'), cells=cells))
    columns = [_named(names, column, 'missed') for column in order]
    return dict(rows=rows, columns=columns, left_out=len(names) - len(shown))


def _named(names: Sequence[str], label: int, otherwise: str) -> str:
    return names[label] if label < len(names) else otherwise


def _confusions(analysis: Analysis, names: Sequence[str]) -> list[dict]:
    """The pairs of classes that are confused most."""
    between = analysis.confusion[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    order = np.argsort(-between, axis=None, kind='stable')[:MAX_CONFUSIONS]
    pairs = (np.unravel_index(place, between.shape) for place in order)
    return [
        dict(true=names[true], predicted=names[predicted], count=int(between[true, predicted]))
        for true, predicted in pairs
        if between[true, predicted]
    ]


# ---- mistakes -------------------------------------------------------------------------------------------------------
def _tile(
    mistake: Mistake,
    image: DetectedImage,
    names: Sequence[str],
    score_thr: float,
    read_image: Callable[[str], np.ndarray],
    *,
    missed: bool,
) -> dict:
    """A crop around the mistake with the boxes in it."""
    box = (image.boxes if missed else image.found)[mistake.box]
    text = _miss_text(mistake, image, names) if missed else _false_positive_text(mistake, image, names, score_thr)
    label = (_truth if missed else _guess)(image, names, mistake.box)
    tile = dict(path=image.path, text=text, label=label)
    try:
        pixels = read_image(image.path)
    except Exception as error:  # a picture less; the numbers stay
        return tile | dict(problem=f'the image cannot be read: {error}')
    x1, y1, x2, y2 = _window(box, pixels.shape)
    boxes = [
        *((truth, 'true', f'true: {names[label]}') for truth, label in zip(image.boxes, image.labels, strict=True)),
        *(
            (found, 'found', _guess(image, names, index))
            for index, found in enumerate(image.found)
            if image.scores[index] >= score_thr and (missed or index != mistake.box)
        ),
        (box, 'mistake', label),
    ]
    return tile | dict(
        uri=data_uri(pixels[y1:y2, x1:x2], longer_side=TILE, kind='JPEG'),
        window=(x1, y1, x2 - x1, y2 - y1),
        boxes=[
            dict(place=[round(float(n), 1) for n in (x, y, right - x, bottom - y)], kind=kind, title=title)
            for (x, y, right, bottom), kind, title in boxes
            if x < x2 and right > x1 and y < y2 and bottom > y1
        ],
    )


def _window(box: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 of a crop with as much around the box as inside, at least a quarter of the image's longer side."""
    side = math.ceil(max(2.0 * max(box[2] - box[0], box[3] - box[1]), max(shape[:2]) / 4))
    edges = []
    for low, high, limit in ((box[0], box[2], shape[1]), (box[1], box[3], shape[0])):
        length = min(side, limit)
        start = min(max(round((low + high - length) / 2), 0), limit - length)
        edges.append((start, start + length))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _truth(image: DetectedImage, names: Sequence[str], index: int) -> str:
    return names[image.labels[index]]


def _guess(image: DetectedImage, names: Sequence[str], index: int) -> str:
    return f'{names[image.found_labels[index]]} {image.scores[index]:.2f}'


def _false_positive_text(mistake: Mistake, image: DetectedImage, names: Sequence[str], score_thr: float) -> str:
    below = '' if image.scores[mistake.box] >= score_thr else ', below the threshold'
    if mistake.kind == 'background':
        return f'no object of this class here{below}'
    other = _truth(image, names, mistake.other)
    texts = dict(
        duplicate='another detection of the same object has a higher score',
        **{'class': f'the object is annotated as {other}'},
        location=f'the box fits the {other} badly',
    )
    return f'{texts[mistake.kind]}, IoU {mistake.iou:.2f}{below}'


def _miss_text(mistake: Mistake, image: DetectedImage, names: Sequence[str]) -> str:
    if mistake.kind == 'nothing':
        return 'no detection of this class here'
    other = _guess(image, names, mistake.other)
    texts = dict(
        score=f'detected below the threshold, as {other}',
        **{'class': f'detected as {other}'},
        location=f'the detection {other} fits badly',
    )
    return f'{texts[mistake.kind]}, IoU {mistake.iou:.2f}'


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 16px; max-width: 1240px; color: #111; }
  h1 { font-size: 22px; margin: 0 0 4px; }
  h2 { font-size: 18px; margin: 36px 0 4px; border-top: 1px solid #ddd; padding-top: 14px; }
  p { max-width: 76em; margin: 6px 0 12px; }
  nav a { margin-right: 14px; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #eee; }
  th:first-child, td:first-child, .facts td { text-align: left; }
  .facts td { overflow-wrap: anywhere; vertical-align: top; }
  .facts td:first-child { color: #555; white-space: nowrap; }
  thead th { position: sticky; top: 0; background: #fff; }
  .mean td { font-weight: 600; border-bottom: 2px solid #999; }
  .name { max-width: 22em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .swatch { display: inline-block; width: 14px; height: 4px; margin-right: 8px; vertical-align: middle; }
  .scroll { overflow: auto; max-height: 85vh; border: 1px solid #ddd; display: inline-block; max-width: 100%; }
  .matrix { font-size: 13px; }
  .matrix td { border: 1px solid #eee; text-align: center; padding: 2px; min-width: 26px; height: 24px; }
  .matrix th { background: #fff; font-weight: 500; }
  .matrix tbody th { position: sticky; left: 0; text-align: right; max-width: 14em; }
  .matrix thead th { vertical-align: bottom; padding: 4px 2px; }
  .matrix thead th:first-child { left: 0; z-index: 2; color: #555; }
  .matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 12em; overflow: hidden;
                       text-overflow: ellipsis; white-space: nowrap; text-align: left; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 16px; }
  figure { margin: 0; }
  figure svg { width: 100%; max-height: 300px; background: #eee; display: block; }
  figcaption { font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
  figcaption small { color: #666; }
  rect { fill: none; vector-effect: non-scaling-stroke; pointer-events: all; }
  .under { stroke: #000; stroke-width: 3.5px; stroke-opacity: .4; }
  .true { stroke: #3ddc55; stroke-width: 2px; stroke-dasharray: 6 3; }
  .found { stroke: #30b0ff; stroke-width: 2px; }
  .mistake { stroke: #ff3b41; stroke-width: 3px; }
  .key { font-weight: 600; padding: 0 5px; background: #222; border-radius: 3px; }
  img { max-width: 100%; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p><b>AP {{ mean.ap | number }}, AP50 {{ mean.ap50 | number }}, AP75 {{ mean.ap75 | number }}</b> on
{{ data }}.
{% if not num_detections %}<b>The detector predicts no box at all.</b>{% endif %}
{% if not mean.boxes %}<b>There is no true box, so there is no AP.</b>{% endif %}</p>
<nav><a href="#classes">Classes</a><a href="#precision-recall">Precision and recall</a><a href="#confusion">Confusion
matrix</a><a href="#false-positives">False positives</a><a href="#misses">Misses</a>
{% if curves %}<a href="#training">Training</a>{% endif %}<a href="#settings">Settings</a></nav>

<h2 id="classes">Accuracy of the classes</h2>
<p><b>AP</b>, average precision, is the area below the precision-recall curve, averaged over ten IoU thresholds from
0.50 to 0.95; AP50 and AP75 use one threshold. 1 is perfect. A high AP50 with a low AP75 means that objects are found
with inaccurate boxes. The AP of a class with few boxes is uncertain.</p>
<p><b>Precision</b> is the share of the detections that are right, <b>recall</b> the share of the objects that are
found, with score ≥ {{ score_thr }} and IoU ≥ {{ iou_thr }}.
{% if has_best_f1 %}
This score threshold has the highest F1, the harmonic mean of both, on these images.
{% elif not num_right %}
No detection reaches this score threshold and matches an object.
{% endif %}</p>
<div class="scroll"><table>
<thead><tr><th>class</th><th>AP</th><th>AP50</th><th>AP75</th><th>precision</th><th>recall</th><th>right</th>
<th>false positives</th><th>missed</th><th>boxes</th><th>images</th></tr></thead>
<tbody>
<tr class="mean"><td>all</td><td>{{ mean.ap | number }}</td><td>{{ mean.ap50 | number }}</td>
<td>{{ mean.ap75 | number }}</td><td>{{ mean.precision | number }}</td><td>{{ mean.recall | number }}</td>
<td>{{ mean.hits }}</td><td>{{ mean.false_alarms }}</td><td>{{ mean.missed }}</td><td>{{ mean.boxes }}</td>
<td>{{ num_images }}</td></tr>
{% for row in classes %}
<tr><td class="name" title="{{ row.name }}">
{% if row.color %}<span class="swatch" style="background: {{ row.color }}"></span>{% endif %}
{{ row.name }}</td>
<td>{{ row.ap | number }}</td><td>{{ row.ap50 | number }}</td><td>{{ row.ap75 | number }}</td>
<td>{{ row.precision | number }}</td><td>{{ row.recall | number }}</td><td>{{ row.hits }}</td>
<td>{{ row.false_alarms }}</td><td>{{ row.missed }}</td><td>{{ row.boxes }}</td><td>{{ row.images }}</td></tr>
{% endfor %}
</tbody></table></div>
<p>As COCO evaluates: at most {{ max_detections }} detections per image and class; crowds and difficult objects do not
count. The first row has the means of AP over the classes that have boxes, and counts all boxes together.
{% if num_empty %}{{ num_empty }} image{{ ' has' if num_empty == 1 else 's have' }} no box.{% endif %}</p>

<h2 id="precision-recall">Precision and recall</h2>
{% if precision_recall %}
<p>A line shows what precision a class has at every recall, at IoU ≥ {{ iou_thr }}: a high score threshold is at the
left, a low one at the right. The area below a line is the AP50 of the class. A line that falls to zero early: the
remaining objects are not detected with any score. A line that starts low: there are false positives with high scores.
Colors are those in the table of classes; the thick black line is the mean.
{% if some_gray %}Only the classes with the highest and the lowest AP50 have a color.{% endif %}</p>
<img src="{{ precision_recall }}" alt="precision-recall curves" width="640">
{% else %}
<p>There is no true box.</p>
{% endif %}

<h2 id="confusion">Confusion matrix</h2>
<p>Rows are true classes, columns predicted ones, for detections with score ≥ {{ score_thr }}. The blue diagonal is
right, everything in red is wrong. The column <i>missed</i> counts objects without a detection, the row <i>no object</i>
detections without an object. Boxes are matched at IoU ≥ {{ iou_thr }}, first within the class, as for AP, then the
remaining ones across classes. Darker cells have a larger share of their row; in the last row, of their column.
{% if matrix.left_out %}The matrix shows the {{ matrix.columns | length - 1 }} classes with the most errors;
{{ matrix.left_out }} are left out.{% endif %}</p>
{% if confusions %}
<p>Confused most:
{% for pair in confusions %}
{{ pair.true }} detected as {{ pair.predicted }} ({{ pair.count }}){{ '.' if loop.last else ',' }}
{% endfor %}</p>
{% endif %}
<div class="scroll"><table class="matrix">
<thead><tr><th>true ↓ predicted →</th>
{% for name in matrix.columns %}<th title="{{ name }}"><span>{{ name }}</span></th>{% endfor %}</tr></thead>
<tbody>
{% for row in matrix.rows %}
<tr><th class="name" title="{{ row.name }}">{{ row.name }}</th>
{% for cell in row.cells %}
{% if cell.count %}
<td title="{{ cell.title }}: {{ cell.share }}" style="background: {{ cell.color }}">{{ cell.count }}</td>
{% else %}
<td></td>
{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

{% macro place(xywh) %}
x="{{ xywh[0] }}" y="{{ xywh[1] }}" width="{{ xywh[2] }}" height="{{ xywh[3] }}"
{%- endmacro %}
{% macro tiles(mistakes) %}
<div class="tiles">
{% for tile in mistakes %}
<figure>
{% if tile.uri %}
<svg viewBox="{{ tile.window | join(' ') }}" role="img" aria-label="{{ tile.label }}">
<image href="{{ tile.uri }}" {{ place(tile.window) }} preserveAspectRatio="none"/>
{% for box in tile.boxes %}
<rect class="under" {{ place(box.place) }}/>
<rect class="{{ box.kind }}" {{ place(box.place) }}><title>{{ box.title }}</title></rect>
{% endfor %}
</svg>
{% else %}
<p>{{ tile.problem }}</p>
{% endif %}
<figcaption><b>{{ tile.label }}</b>: {{ tile.text }}<br><small>{{ tile.path }}</small></figcaption>
</figure>
{% endfor %}
</div>
{% endmacro %}
{% set key %}
<span class="key" style="color: #ff3b41">the mistake</span>
<span class="key" style="color: #3ddc55">true boxes (dashed)</span>
<span class="key" style="color: #30b0ff">detections with score ≥ {{ score_thr }}</span>
{% endset %}
<h2 id="false-positives">Worst false positives</h2>
{% if false_positives %}
<p>The detections with the highest scores that match no true box of their class at IoU ≥ {{ iou_thr }}. Look for errors
in the annotations first: if the object is there, its box is missing, inaccurate, or has the wrong class. A box “fits
badly” from IoU {{ located }}. Point at a box to see its class. {{ key }}</p>
{{ tiles(false_positives) }}
{% else %}
<p>None: every detection matches a true box.</p>
{% endif %}

<h2 id="misses">Worst misses</h2>
{% if misses %}
<p>The largest true boxes, by area in pixels, that no detection of their class with score ≥ {{ score_thr }} matches at
IoU ≥ {{ iou_thr }}. What do they have in common: size, pose, light, occlusion? Such images help most as further
training data. {{ key }}</p>
{{ tiles(misses) }}
{% else %}
<p>None: every true box is detected.</p>
{% endif %}

{% if curves %}
<h2 id="training">Training</h2>
<p>Loss and validation of the training. If the AP still rises at the end, train longer. If it falls, or stays, while the
loss falls, the detector overfits: more images or stronger augmentation help, more epochs do not.</p>
<img src="{{ curves }}" alt="training curves">
{% endif %}

<h2 id="settings">Settings</h2>
<table class="facts">
{% for name, value in facts.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""

"""A self-contained HTML page that shows what queries attend to, with selectors for query, layer, head and level.

The page contains JSON data and a script that draws an SVG, whose user units are image pixels. Text from the data is
inserted as text nodes only.
"""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msda_plugin.visualization.attention import LayerView, QueryView
from msda_plugin.visualization.attention_figure import (
    ALL_MARKERS,
    DETECTION,
    INK,
    LARGEST,
    LEVEL_COLORS,
    NEARLY,
    PAPER,
    SMALLEST,
    layer_window,
)
from msda_plugin.visualization.data_uri import data_uri

MAX_SIDE = 1600  # longer side of the embedded image, pixels; coordinates stay those of the original image


def attention_page(image: np.ndarray, queries: Sequence[QueryView], *, title: str) -> str:
    """The HTML page as a string.

    Args:
        image: (H, W, 3) uint8, RGB: the original image.
        queries: from :class:`msda_plugin.visualization.attention.Recording`.
        title: title of the page.

    Raises:
        ValueError: If ``queries`` is empty.
    """
    if not queries:
        raise ValueError('expected at least one query, got none')
    data = dict(
        width=image.shape[1],
        height=image.shape[0],
        image=data_uri(image, longer_side=MAX_SIDE),
        style=dict(
            colors=LEVEL_COLORS,
            ink=INK,
            paper=PAPER,
            detection=DETECTION,
            largest=LARGEST,
            smallest=SMALLEST,
            all=ALL_MARKERS,
            nearly=NEARLY,
        ),
        queries=[
            dict(
                label=query.label,
                at=_numbers(query.at),
                box=_numbers(query.box),
                layers=[_layer(query, view, image) for view in query.layers],
            )
            for query in queries
        ],
    )
    page = PAGE.replace('%TITLE%', html.escape(title))
    return page.replace('%DATA%', _script_safe(json.dumps(data, separators=(',', ':'), allow_nan=False)))


def write_attention_page(
    path: str | os.PathLike, image: np.ndarray, queries: Sequence[QueryView], *, title: str
) -> None:
    """Write :func:`attention_page` to a file."""
    Path(path).write_text(attention_page(image, queries, title=title), encoding='utf-8')


def _layer(query: QueryView, view: LayerView, image: np.ndarray) -> dict:
    x, y = view.xy.T
    return dict(
        name=view.name,
        kind=view.kind,
        local=view.is_local,
        query=view.query,
        at=_numbers(view.at),
        box=_numbers(view.box),
        window=_numbers(layer_window(query, view, image.shape)),
        levels=view.level_names,
        cells=_numbers(view.cells),
        head=view.head.tolist(),
        level=view.level.tolist(),
        x=_numbers(x),
        y=_numbers(y),
        weight=np.round(view.weight, 6).tolist(),
        origin=_numbers(view.origin),
    )


def _numbers(array: np.ndarray | None) -> list | None:
    """Pixels, rounded to hundredths."""
    return None if array is None else np.round(array, 2).tolist()


def _script_safe(text: str) -> str:
    """Escape JSON for a script element, so that it cannot end the element or start a comment."""
    for character in '<>&\u2028\u2029':
        text = text.replace(character, f'\\u{ord(character):04x}')
    return text


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%TITLE%</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 0; color: #111; background: #fafafa; }
  header { padding: 10px 16px; background: #fff; border-bottom: 1px solid #ddd; }
  h1 { font-size: 17px; margin: 0 0 8px; }
  .controls { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; }
  label { display: inline-flex; gap: 6px; align-items: center; }
  select { font: inherit; max-width: 24em; }
  main { display: flex; flex-wrap: wrap; gap: 16px; padding: 14px 16px; align-items: flex-start; }
  #figure { flex: 0 1 auto; display: block; background: #888; border: 1px solid #444; }
  #side { flex: 1 1 250px; max-width: 420px; }
  #legend { list-style: none; margin: 8px 0; padding: 0; }
  #legend li { display: flex; gap: 8px; align-items: center; min-height: 26px; }
  #legend svg { flex: none; }
  #status { margin: 0 0 8px; }
  .small { image-rendering: pixelated; }
  .pale { filter: grayscale(1) opacity(.6); }
  label:has(:disabled) { color: #999; }
  #figure.selectable { cursor: pointer; }
</style>
</head>
<body>
<header>
  <h1>%TITLE%</h1>
  <div class="controls">
    <label>Query <select id="query"></select></label>
    <label>Layer <select id="layer"></select></label>
    <label>Head <select id="head"></select></label>
    <label>Level <select id="level"></select></label>
    <label>Color by
      <select id="color"><option value="level">level</option><option value="head">head</option></select></label>
    <label><input type="checkbox" id="zoom" checked> zoom to the query</label>
    <label><input type="checkbox" id="boxes" checked> boxes of all layers</label>
    <label><input type="checkbox" id="others" checked> other queries</label>
    <label><input type="checkbox" id="pale"> pale image</label>
  </div>
</header>
<main>
  <svg id="figure" role="img" aria-label="samples of the query"></svg>
  <div id="side">
    <p id="status" aria-live="polite"></p>
    <ul id="legend"></ul>
    <p id="hint">Hover over a point to see its weight; click another query or its box to select it.</p>
  </div>
</main>
<noscript>This page needs JavaScript.</noscript>
<script type="application/json" id="data">%DATA%</script>
<script>
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const element = id => document.getElementById(id);
const figure = element('figure');
const controls = ['query', 'layer', 'head', 'level', 'color'], switches = ['zoom', 'boxes', 'others', 'pale'];
const style = data.style;

function svg(name, attributes, title) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (title) {
    const text = document.createElementNS('http://www.w3.org/2000/svg', 'title');
    text.textContent = title;
    node.append(text);
  }
  return node;
}

function fill(select, options, wanted) {  // options: [value, text]
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  select.value = options.some(([value]) => String(value) === String(wanted)) ? wanted : options[0][0];
}

// What the user chose last. A layer without this head or level shows another one, without changing the choice.
const choice = {};

const unique = values => [...new Set(values)].sort((a, b) => a - b);
const currentQuery = () => data.queries[element('query').value];
const currentLayer = () => currentQuery().layers.find(layer => layer.name === element('layer').value);

function fillLayer() {
  const layers = currentQuery().layers;
  const wanted = layers.some(layer => layer.name === choice.layer) ? choice.layer : layers[layers.length - 1].name;
  fill(element('layer'), layers.map(layer => [layer.name, layer.name]), wanted);
}

function fillHeads() {
  fill(element('head'), [['all', 'all'], ...unique(currentLayer().head).map(i => [i, `head ${i}`])], choice.head);
}

function fillLevels() {  // levels of the selected head
  const layer = currentLayer(), head = element('head').value;
  const levels = unique(layer.level.filter((_, i) => head === 'all' || layer.head[i] === Number(head)));
  const all = layer.cells && levels.length > 1 ? [] : [['all', 'all']];  // cells of two sizes would overlap
  fill(element('level'), [...all, ...levels.map(i => [i, layer.levels[i]])], choice.level);
}

function fillAll() {
  fillLayer();
  fillHeads();
  fillLevels();
}

function disableUseless(query, layer, samples) {  // controls that would change nothing
  for (const id of ['query', 'layer', 'head', 'level']) element(id).disabled = element(id).length < 2;
  const several = key => new Set(samples.map(sample => sample[key])).size > 1;
  element('color').disabled = !layer.local || !(several('head') || several('level'));
  const whole = [0, 0, data.width, data.height];
  element('zoom').disabled = !layer.local || layer.window.every((value, i) => value === whole[i]);
  element('boxes').disabled = !query.box && !query.layers.some(other => other.box && other !== layer);
  element('others').disabled = data.queries.length < 2;
}

function chosenSamples(layer) {
  const head = element('head').value, level = element('level').value;
  const samples = [];
  for (let i = 0; i < layer.x.length; i++) {
    if (head !== 'all' && layer.head[i] !== Number(head)) continue;
    if (level !== 'all' && layer.level[i] !== Number(level)) continue;
    samples.push({head: layer.head[i], level: layer.level[i], x: layer.x[i], y: layer.y[i], weight: layer.weight[i],
                  origin: layer.origin && layer.origin[i], heads: 1});
  }
  if (layer.local) return samples;
  const places = new Map();  // average heads with the same sample locations
  for (const sample of samples) {
    const key = `${sample.level} ${sample.x} ${sample.y}`, other = places.get(key);
    if (other) { other.weight += sample.weight; other.heads += 1; } else places.set(key, sample);
  }
  for (const sample of places.values()) sample.weight /= sample.heads;
  return [...places.values()];
}

function largestWeight(samples, layer) {  // multi-scale deformable attention: one scale for all layers
  let largest = 0;
  const weights = layer.local ? currentQuery().layers.filter(other => other.local).map(other => other.weight)
                              : [samples.map(sample => sample.weight)];
  for (const list of weights) for (const weight of list) largest = Math.max(largest, weight);
  return largest;
}

const shapes = [
  r => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`,
  r => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  r => `M0 ${-1.2 * r}L${1.1 * r} ${r}H${-1.1 * r}Z`,
  r => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  r => `M0 ${1.2 * r}L${1.1 * r} ${-r}H${-1.1 * r}Z`];

function colorOf(sample) {
  const index = sample[currentLayer().local ? element('color').value : 'level'];  // others: means over heads
  return index < style.colors.length ? style.colors[index] : `hsl(${index * 137.5 % 360} 75% 50%)`;
}

function radius(strength, layer, count) {  // many markers are smaller, so they do not hide the image
  const largest = layer.local ? style.largest : Math.min(style.largest, style.all / count);
  const smallest = Math.min(style.smallest, largest / 8);
  return Math.sqrt((smallest + (largest - smallest) * strength) / Math.PI) * 2.4;
}

function cross(at, size, color) {
  const a = size, b = size / 3;
  return svg('path', {d: `M${-b} ${-a}H${b}V${-b}H${a}V${b}H${b}V${a}H${-b}V${b}H${-a}V${-b}H${-b}Z`,
                      transform: `translate(${at[0]} ${at[1]})`, fill: color, stroke: style.ink,
                      'stroke-width': size / 6, class: 'place'});
}

function rectangle(box, color, width, dash, attributes, title) {
  const [left, top, right, bottom] = box;
  return svg('rect', {x: left, y: top, width: Math.max(right - left, 0), height: Math.max(bottom - top, 0),
                      fill: 'none', stroke: color, 'stroke-width': width, 'stroke-dasharray': dash, ...attributes},
             title);
}

function draw() {
  const query = currentQuery(), layer = currentLayer();
  const zoomed = element('zoom').checked && layer.local;
  const [left, top, right, bottom] = zoomed ? layer.window : [0, 0, data.width, data.height];
  const room = Math.max(280, Math.min(figure.parentElement.clientWidth - 32, 1000));
  const tallest = Math.max(window.innerHeight - 150, 350);
  const shown = Math.min(room, tallest * (right - left) / (bottom - top));
  figure.setAttribute('viewBox', `${left} ${top} ${right - left} ${bottom - top}`);
  figure.setAttribute('width', Math.round(shown));
  figure.setAttribute('height', Math.round(shown * (bottom - top) / (right - left)));
  const unit = (right - left) / shown;  // image pixels per screen pixel

  const image = svg('image', {href: data.image, x: 0, y: 0, width: data.width, height: data.height,
                              preserveAspectRatio: 'none'});
  image.classList.toggle('small', Math.max(data.width, data.height) < 256);
  image.classList.toggle('pale', element('pale').checked);
  const nodes = [image];

  const samples = chosenSamples(layer).sort((a, b) => a.weight - b.weight);
  const largest = largestWeight(samples, layer);
  for (const sample of samples) {
    const strength = largest > 0 ? Math.min(sample.weight / largest, 1) : 0;
    const who = layer.local || sample.heads === 1 ? `head ${sample.head}` : `mean of ${sample.heads} heads`;
    const title = `${who}, ${layer.levels[sample.level]}, weight ${sample.weight.toPrecision(3)}, ` +
                  `x ${sample.x.toFixed(1)}, y ${sample.y.toFixed(1)}`;
    const common = {class: 'sample', 'data-x': sample.x, 'data-y': sample.y, 'data-head': sample.head,
                    'data-level': sample.level, fill: colorOf(sample)};
    if (layer.cells) {
      const [w, h] = layer.cells[sample.level];
      nodes.push(svg('rect', {...common, x: sample.x - w / 2, y: sample.y - h / 2, width: w, height: h,
                              'fill-opacity': 0.75 * strength, stroke: '#fff', 'stroke-opacity': 0.35,
                              'stroke-width': 0.6 * unit}, title));
      continue;
    }
    if (sample.origin) nodes.push(svg('line', {x1: sample.origin[0], y1: sample.origin[1], x2: sample.x, y2: sample.y,
                                               stroke: style.ink, 'stroke-opacity': 0.5, 'stroke-width': 0.8 * unit}));
    const outline = {d: shapes[sample.level % shapes.length](radius(strength, layer, samples.length) * unit),
                     transform: `translate(${sample.x} ${sample.y})`};
    nodes.push(svg('path', {...outline, fill: '#fff', 'fill-opacity': 0.4, stroke: '#fff', 'stroke-opacity': 0.5,
                            'stroke-width': (layer.local ? 3 : 1) * unit}));  // a light outline, visible on dark images
    nodes.push(svg('path', {...common, ...outline, 'fill-opacity': 0.3 + 0.6 * strength, stroke: style.ink,
                            'stroke-width': (layer.local ? 0.9 : 0.4) * unit}, title));
  }
  if (element('others').checked) data.queries.forEach((other, i) => {
    if (other === query) return;
    const mark = other.box ? rectangle(other.box, '#fff', 1.2 * unit, 'none', {'pointer-events': 'all'}, other.label)
                           : cross(other.at, 6 * unit, '#ccc');
    mark.setAttribute('class', 'other');
    mark.setAttribute('data-query', i);
    mark.setAttribute('stroke-opacity', 0.55);
    nodes.splice(1, 0, mark);
  });
  const references = element('boxes').checked ? query.layers.filter(other => other.box) : layer.box ? [layer] : [];
  references.forEach(other => {
    const width = other === layer ? 2 : 1;
    nodes.push(rectangle(other.box, style.ink, (width + 1.4) * unit, 'none', {'pointer-events': 'none',
                         'stroke-opacity': 0.6}));
    nodes.push(rectangle(other.box, '#fff', width * unit, `${6 * unit} ${4 * unit}`, {'pointer-events': 'none',
                         class: 'reference'}));
  });
  if (query.box && element('boxes').checked) {
    nodes.push(rectangle(query.box, style.ink, 3.4 * unit, 'none', {'pointer-events': 'none'}));
    nodes.push(rectangle(query.box, style.detection, 2 * unit, 'none', {'pointer-events': 'none', id: 'detection'}));
  }
  nodes.push(cross(layer.at, 9 * unit, style.paper));
  figure.replaceChildren(...nodes);

  const outside = samples.filter(s => s.x < 0 || s.y < 0 || s.x > data.width || s.y > data.height).length;
  const maximum = samples[samples.length - 1].weight;
  const uniform = 1 / layer.head.filter(head => head === samples[0].head).length;  // all samples of a head alike
  element('status').textContent = `${query.label} · ${layer.name} · ${layer.query} · ${samples.length} ` +
    `${layer.cells ? 'cells' : 'points'}` + (outside ? `, ${outside} of them outside the image` : '') +
    ` · max weight ${maximum.toPrecision(2)}, uniform ${uniform.toPrecision(2)}` +
    (maximum < style.nearly * uniform ? ' (nearly uniform)' : '');
  drawLegend(layer, samples, largest, query);
  disableUseless(query, layer, samples);
  const state = new URLSearchParams(controls.map(id => [id, choice[id] ?? element(id).value]));
  for (const id of switches) state.set(id, element(id).checked ? 1 : 0);
  history.replaceState(null, '', '#' + state);
}

function drawLegend(layer, samples, largest, query) {
  const items = [];
  function item(node, text) {
    const box = svg('svg', {width: 32, height: 28, viewBox: '-16 -14 32 28'});
    box.append(node);
    const entry = document.createElement('li');
    entry.append(box, text);
    items.push(entry);
  }
  item(cross([0, 0], 8, style.paper), 'query');
  if (layer.box) item(rectangle([-10, -7, 10, 7], '#555', 1.8, '5 3', {}), 'reference box of the layer');
  if (query.box) item(rectangle([-10, -7, 10, 7], style.detection, 2.5, 'none', {}), 'detection');
  if (layer.origin) item(svg('path', {d: 'M-11 5L11 -5', stroke: style.ink}), 'displacement of a point');
  const total = samples.reduce((sum, sample) => sum + sample.weight * sample.heads, 0) || 1;
  const byHead = layer.local && element('color').value === 'head';
  for (const index of unique(samples.map(sample => byHead ? sample.head : sample.level))) {
    const of = samples.filter(sample => (byHead ? sample.head : sample.level) === index);
    const share = of.reduce((sum, sample) => sum + sample.weight * sample.heads, 0) / total;
    const d = layer.cells ? shapes[1](7) : shapes[byHead ? 0 : index % shapes.length](7);
    item(svg('path', {d, fill: colorOf(of[0]), stroke: style.ink}),
         `${byHead ? `head ${index}` : layer.levels[index]}: ${(100 * share).toFixed(0)}% of the shown weight`);
  }
  for (const share of [1, 0.3, 0.05]) {
    const mark = layer.cells ? {d: shapes[1](8), 'fill-opacity': 0.75 * share}
                             : {d: shapes[0](radius(share, layer, samples.length)), 'fill-opacity': 0.3 + 0.6 * share};
    item(svg('path', {...mark, fill: '#555', stroke: style.ink}), `weight ${(share * largest).toPrecision(2)}`);
  }
  element('legend').replaceChildren(...items);
}

function place(event) {  // of a mouse event, in pixels of the image
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(figure.getScreenCTM().inverse());
}

function queryAt(event) {  // the query whose box or cross is under the pointer; null: none
  if (!element('others').checked) return null;
  const {x, y} = place(event), near = 12 / figure.getScreenCTM().a;  // 12 screen pixels
  const areas = data.queries.map(({box, at}) => box
    ? (x >= box[0] && y >= box[1] && x <= box[2] && y <= box[3] ? (box[2] - box[0]) * (box[3] - box[1]) : Infinity)
    : (Math.hypot(x - at[0], y - at[1]) <= near ? 0 : Infinity));
  const under = [...areas.keys()].filter(i => areas[i] < Infinity).sort((i, j) => areas[i] - areas[j]);
  if (!under.length) return null;
  return under[(under.indexOf(Number(element('query').value)) + 1) % under.length];  // repeated clicks: next larger box
}

function changed(id) {
  if (id in choice) choice[id] = element(id).value;
  if (id === 'query') fillAll();
  if (id === 'layer') { fillHeads(); fillLevels(); }
  if (id === 'head') fillLevels();
  if (id === 'query' || id === 'layer') element('pale').checked = !currentLayer().local;
  draw();
}

function restore() {  // the URL fragment holds the state, so that a view can be shared as a link
  const state = new URLSearchParams(location.hash.slice(1));
  fill(element('query'), data.queries.map((query, i) => [i, query.label]), state.get('query'));
  Object.assign(choice, {layer: state.get('layer'), head: state.get('head') ?? 'all',
                         level: state.get('level') ?? 'all'});
  fillAll();
  if (['level', 'head'].includes(state.get('color'))) element('color').value = state.get('color');
  element('pale').checked = !currentLayer().local;
  for (const id of switches) if (state.has(id)) element(id).checked = state.get(id) === '1';
  draw();
}

for (const id of [...controls, ...switches]) element(id).addEventListener('change', () => changed(id));
figure.addEventListener('click', event => {
  const found = queryAt(event);
  if (found === null || String(found) === element('query').value) return;
  element('query').value = found;
  changed('query');
});
figure.addEventListener('mousemove', event => {
  const found = queryAt(event);
  figure.classList.toggle('selectable', found !== null && String(found) !== element('query').value);
});
window.addEventListener('resize', draw);
window.addEventListener('hashchange', restore);
restore();
</script>
</body>
</html>
"""

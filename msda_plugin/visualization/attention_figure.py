"""Draws what a query attends to over the image: all layers, or one layer head by head."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from msda_plugin.visualization.attention import LayerView, QueryView

# The palette of Okabe and Ito, which is safe for color-blind readers, and marker shapes.
LEVEL_COLORS = ('#56b4e9', '#e69f00', '#009e73', '#cc79a7', '#f0e442', '#0072b2', '#d55e00')
LEVEL_SHAPES = 'os^Dv<>'
INK, PAPER, DETECTION = '#111111', '#ffffff', '#f0e442'
LARGEST, SMALLEST = 80, 3  # areas of markers, square points
ALL_MARKERS = 12000  # total marker area of a layer that attends to the whole image, square points
PANEL = 3.5  # width of a panel, inches
GAP = 0.1  # between panels, inches
COLUMNS = (4, 5, 3)  # columns of panels, in order of preference
TITLE, HEADING = 8, 11  # sizes of the fonts of panels and of the figure, points
LETTER = 0.6  # mean width of a letter, in font sizes
# Transparent to opaque, over the pale image.
HEAT = LinearSegmentedColormap.from_list(
    'heat', [(1, 0.95, 0.7, 0), (1, 0.88, 0.5, 0.5), (0.95, 0.45, 0.15, 0.75), (0.65, 0, 0.15, 0.9)]
)
FAINT = 1 / 4  # multiple of the uniform weight where the color scale starts; it ends at 4 or more
NEARLY = 1.2  # a map whose largest weight is below this multiple of the uniform weight is marked


@dataclass(frozen=True)
class Panel:
    """The samples of a layer, or of a part of it, to draw as one panel.

    Attributes:
        view: the samples, merged where heads share them.
        window: (left, top, right, bottom), the part of the image to show, in pixels.
        uniform: the weight of each sample if its head attended to all of its samples equally.
        title: the lines of the title.
    """

    view: LayerView
    window: np.ndarray
    uniform: float
    title: tuple[str, ...]

    @classmethod
    def of(cls, view: LayerView, window: np.ndarray, title: Sequence[str], keep: np.ndarray | None = None) -> 'Panel':
        """The samples ``keep``, (N,) bool, of a layer; None: all."""
        keep = np.ones(len(view.head), bool) if keep is None else keep
        shown, uniform = view.merged(keep), float(view.uniform[keep][0])
        title = (*title, f'max weight {shown.weight.max():.2g}, uniform {uniform:.2g}')
        if shown.weight.max() < NEARLY * uniform:
            title += ('nearly uniform',)
        return cls(shown, window, uniform, title)


@dataclass(frozen=True)
class Scale:
    """What size and color mean in all panels of a figure.

    Attributes:
        largest: the weight of the largest points of multi-scale deformable attention; 0: there is no such layer.
        multiple: the multiple of the uniform weight that has the strongest color, in layers that attend to the whole
            image; 0: there is no such layer.
    """

    largest: float
    multiple: float

    @classmethod
    def of(cls, panels: Sequence[Panel]) -> 'Scale':
        local = [panel.view.weight.max() for panel in panels if panel.view.is_local]
        multiples = [panel.view.weight.max() / panel.uniform for panel in panels if not panel.view.is_local]
        return cls(max(local, default=0.0), max([1 / FAINT, *multiples]) if multiples else 0.0)

    @property
    def colors(self) -> ScalarMappable:
        """Colors of multiples of the uniform weight."""
        return ScalarMappable(LogNorm(FAINT, self.multiple, clip=True), HEAT)

    def strength(self, panel: Panel) -> np.ndarray:
        """(N,), 0-1: the share of the largest size, or the position on the color scale."""
        if panel.view.is_local:
            return (panel.view.weight / self.largest).clip(0, 1)
        multiples = (panel.view.weight / panel.uniform).clip(FAINT, self.multiple)
        return np.log(multiples / FAINT) / np.log(self.multiple / FAINT)


def draw_query(image: np.ndarray, query: QueryView, *, title: str = '') -> np.ndarray:
    """Draw a panel of the image with the query and the refinement of its box, and one or more panels per layer.

    Every panel names its largest weight, and the weight of attention that is uniform. Panels of multi-scale deformable
    attention show the part of the image that encoder or decoder attend to; the size of a point shows its weight, its
    color the level. The other layers show the whole image; the color shows the weight as a multiple of uniform
    attention, and heads with the same samples are averaged. Shunted attention has a panel per scale, DAT a panel per
    group, with lines from the original to the moved points. All panels share both scales.

    Args:
        image: (H, W, 3) uint8, RGB: the original image.
        query: from :class:`msda_plugin.visualization.attention.Recording`.
        title: title of the figure, before the query's label.

    Returns:
        The figure, (H', W', 3) uint8, RGB.
    """

    def overview(axis: Axes) -> None:
        _show(axis, image, whole(image.shape))
        _draw_boxes(axis, query)
        _draw_place(axis, query.at)

    panels = []
    for view in query.layers:
        window = layer_window(query, view, image.shape)
        if view.is_local:
            panels.append(Panel.of(view, window, (view.name, view.query)))
        else:
            panels += [
                Panel.of(view, window, (view.name, _part_name(view, level)), view.level == level)
                for level in range(len(view.level_names))
            ]
    caption = 'query' if query.box is None else 'references by decoder layer, detection'
    return _pixels(_figure(panels, image, _join(title, query.label), (caption, overview)))


def draw_heads(image: np.ndarray, query: QueryView, view: LayerView, *, title: str = '') -> np.ndarray:
    """Draw one layer: a panel per head, and one of all heads if they attend to a few points.

    Arguments and result as for :func:`draw_query`.
    """
    window = layer_window(query, view, image.shape)
    panels = [Panel.of(view, window, ('all heads',))] if view.is_local else []
    for head in np.unique(view.head):
        keep = view.head == head
        looks_at = '' if view.is_local else f', {view.level_names[view.level[keep][0]]}'
        panels.append(Panel.of(view, window, (f'head {head}{looks_at}',), keep))
    return _pixels(_figure(panels, image, _join(title, f'{query.label} · {view.name}')))


def _part_name(view: LayerView, level: int) -> str:
    heads = len(np.unique(view.head[view.level == level]))
    return view.level_names[level] + (f', mean of {heads} heads' if heads > 1 else '')


def whole(shape: Sequence[int]) -> np.ndarray:
    """(left, top, right, bottom) of an image of ``shape`` (h, w, …), in pixels."""
    return np.array([0, 0, shape[1], shape[0]], float)


def layer_window(query: QueryView, view: LayerView, shape: Sequence[int]) -> np.ndarray:
    """The part of an image of ``shape`` (h, w, …) to show for a layer, (left, top, right, bottom) in pixels.

    All encoder layers share one window, and so do all decoder layers. The window contains the references and the
    central 90% of the weight along each axis. It has the image's aspect ratio and extends beyond the image by at most a
    twelfth. If it covers most of the image, or the layer attends to the whole image, it is the whole image.
    """
    views = [other for other in query.layers if other.kind == view.kind]
    if not view.is_local:
        return whole(shape)
    size = np.array(shape[1::-1], float)
    weight, xy = np.concatenate([other.weight for other in views]), np.concatenate([other.xy for other in views])
    corners = [other.at for other in views]
    corners += [corner for other in views if other.box is not None for corner in (other.box[:2], other.box[2:])]
    for quantile in (0.05, 0.95):
        corners.append(np.array([_weighted_quantile(xy[:, axis], weight, quantile) for axis in (0, 1)]))
    low, high = np.min(corners, 0), np.max(corners, 0)
    share = max(((high - low) / size).max() * 1.3, 0.1)
    if share > 0.8:
        return whole(shape)
    half = size * share / 2
    center = np.clip((low + high) / 2, half - size / 12, size * 13 / 12 - half)
    return np.concatenate([center - half, center + half])


def _weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> float:
    order = values.argsort()
    share = weights[order].cumsum() / weights.sum()
    return values[order][min(np.searchsorted(share, quantile), len(values) - 1)]


def _join(*parts: str) -> str:
    return ': '.join(part for part in parts if part)


def _draw_panel(axis: Axes, image: np.ndarray, panel: Panel, scale: Scale) -> None:
    view = panel.view
    _show(axis, image, panel.window, pale=not view.is_local)
    strength = scale.strength(panel)
    if view.cells is None:
        _draw_points(axis, view, strength)
    else:
        _draw_cells(axis, view, strength)
    if view.box is not None:
        _draw_box(axis, view.box, PAPER, '--')
    _draw_place(axis, view.at)


def _show(axis: Axes, image: np.ndarray, window: np.ndarray, pale: bool = False) -> None:
    if pale:  # makes the colors of the samples visible
        image = (0.35 * 255 + 0.65 * image.mean(2, keepdims=True).repeat(3, 2)).astype(np.uint8)
    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, width, height, 0), interpolation='nearest' if max(height, width) < 256 else 'auto')
    axis.set(xlim=window[::2], ylim=window[[3, 1]], xticks=[], yticks=[], facecolor='#888888')


def _draw_points(axis: Axes, view: LayerView, strength: np.ndarray) -> None:
    if view.origin is not None:
        thin = 0.5 * min(1, (300 / len(view.xy)) ** 0.5)  # many lines would hide the points
        axis.add_collection(LineCollection(np.stack([view.origin, view.xy], 1), colors=INK, linewidths=thin, alpha=0.5))
    for level in np.unique(view.level):
        of_level = np.flatnonzero(view.level == level)
        of_level = of_level[view.weight[of_level].argsort()]  # highest weight on top
        x, y = view.xy[of_level].T
        marker = dict(
            s=_area(strength[of_level], marker_area(view)), marker=LEVEL_SHAPES[level % len(LEVEL_SHAPES)], zorder=3
        )
        # A light outline, visible on dark images.
        rim = 1 if view.is_local else 0.3
        axis.scatter(x, y, c=PAPER, alpha=0.4, edgecolors=PAPER, linewidths=1.4 * rim, **marker)
        if view.is_local:
            marker |= dict(c=LEVEL_COLORS[level % len(LEVEL_COLORS)], alpha=_opacity(strength[of_level]))
        else:
            marker |= dict(c=HEAT(strength[of_level]))
        axis.scatter(x, y, edgecolors=INK, linewidths=0.6 * rim, **marker)


def marker_area(view: LayerView) -> float:
    """Area of the largest marker, in square points."""
    return LARGEST if view.is_local else min(LARGEST, ALL_MARKERS / len(view.xy))


def _area(strength: np.ndarray | float, largest: float = LARGEST) -> np.ndarray | float:
    smallest = min(SMALLEST, largest / 8)
    return smallest + (largest - smallest) * strength


def _opacity(strength: np.ndarray) -> np.ndarray:
    return 0.3 + 0.6 * strength


def _draw_cells(axis: Axes, view: LayerView, strength: np.ndarray) -> None:
    sizes = view.cells[view.level]
    patches = [Rectangle(corner, *size) for corner, size in zip(view.xy - sizes / 2, sizes, strict=True)]
    edges = dict(edgecolors=(1, 1, 1, 0.35), linewidths=min(0.4, 100 / len(patches)))  # a fine grid would hide colors
    axis.add_collection(PatchCollection(patches, facecolors=HEAT(strength), **edges))


def _draw_boxes(axis: Axes, query: QueryView) -> None:
    """Draw the reference boxes, with thinner lines for earlier layers, and the detection."""
    references = [view.box for view in query.layers if view.box is not None]
    for i, box in enumerate(references):
        _draw_box(axis, box, PAPER, '--', 0.6 + 0.8 * i / len(references))
    for before, after in zip(references, references[1:], strict=False):
        axis.plot(*np.stack([(box[:2] + box[2:]) / 2 for box in (before, after)], 1), color=PAPER, linewidth=0.8)
    if query.box is not None:
        _draw_box(axis, query.box, DETECTION, '-', 1.8)


def _draw_box(axis: Axes, box: np.ndarray, color: str, style: str, width: float = 1.2) -> None:
    outline = withStroke(linewidth=width + 1.2, foreground=INK, alpha=0.7)
    axis.add_patch(
        Rectangle(
            box[:2],
            *(box[2:] - box[:2]),
            fill=False,
            edgecolor=color,
            linestyle=style,
            linewidth=width,
            path_effects=[outline],
        )
    )


def _draw_place(axis: Axes, at: np.ndarray) -> None:
    axis.plot(*at, marker='P', color=PAPER, markeredgecolor=INK, markeredgewidth=0.8, markersize=8, zorder=4)


def _figure(
    panels: Sequence[Panel], image: np.ndarray, title: str, overview: tuple[str, Callable[[Axes], None]] | None = None
) -> Figure:
    """A figure of panels, after an overview: its title, and a function that draws it."""
    scale = Scale.of(panels)
    draws = [((caption,), draw) for caption, draw in filter(None, [overview])]
    draws += [(panel.title, partial(_draw_panel, image=image, panel=panel, scale=scale)) for panel in panels]
    columns = min(min(COLUMNS, key=lambda columns: -len(draws) % columns), len(draws))
    width = (PANEL + GAP) * columns + GAP
    side = np.clip(PANEL * image.shape[0] / image.shape[1], 0.5, 3 * PANEL)  # height of the image in a panel
    titles = [_wrapped(lines, PANEL, TITLE) for lines, _ in draws]
    titles_height = _height(max(titles, key=len), TITLE) + GAP
    heading = _wrapped([title], width, HEADING)
    heading_height = _height(heading, HEADING) + GAP
    handles = _legend([panel.view for panel in panels], scale)
    entry = LETTER * TITLE / 72 * (6 + max(len(handle.get_label()) for handle in handles))  # width, inches
    legend_columns = min(max(1, int(width / entry)), len(handles))
    legend_height = -(-len(handles) // legend_columns) * 1.8 * TITLE / 72 + 2 * GAP
    scale_height = 0.8 if scale.multiple else 0
    rows = -(-len(draws) // columns)
    height = heading_height + rows * (titles_height + side) + legend_height + scale_height

    # Explicit positions: matplotlib's layouts reserve too little for titles above images.
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - GAP / 2 / height, '\n'.join(heading), fontsize=HEADING, ha='center', va='top')
    for number, (lines, (_, draw)) in enumerate(zip(titles, draws, strict=True)):
        row, column = divmod(number, columns)
        left = GAP + column * (PANEL + GAP)
        bottom = height - heading_height - (row + 1) * (titles_height + side)
        axis = figure.add_axes((left / width, bottom / height, PANEL / width, side / height))
        draw(axis)
        axis.set_title('\n'.join(lines), fontsize=TITLE, pad=3)
    figure.legend(
        handles=handles, loc='lower center', ncols=legend_columns, fontsize=TITLE, frameon=False, labelcolor=INK
    )
    if scale.multiple:
        bar = figure.add_axes((0.2, (legend_height + 0.4) / height, 0.6, 0.18 / height))
        _draw_color_scale(figure, bar, scale)
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _wrapped(lines: Sequence[str], width: float, size: float) -> list[str]:
    """Break lines of text in a font of `size` points, so that they are at most `width` inches wide."""
    letters = max(8, int(width * 72 / (LETTER * size)))
    return [part for line in lines for part in textwrap.wrap(line, letters)]


def _height(lines: Sequence[str], size: float) -> float:
    """Inches of lines of text in a font of `size` points."""
    return 1.25 * len(lines) * size / 72


def _draw_color_scale(figure: Figure, axis: Axes, scale: Scale) -> None:
    bar = figure.colorbar(scale.colors, cax=axis, orientation='horizontal')
    axis.set_facecolor('#c8c8c8')  # as a pale image: the colors are transparent
    step = next((step for step in (2, 4, 16) if scale.multiple <= 4 * step**3), 64)
    ticks = [FAINT, 1.0]
    while ticks[-1] * step**1.5 < scale.multiple:
        ticks.append(ticks[-1] * step)
    ticks.append(scale.multiple)
    labels = [f'at most {FAINT:g}', '1: uniform', *(f'{tick:.3g}' for tick in ticks[2:])]
    bar.set_ticks(ticks, labels=labels)
    bar.minorticks_off()
    axis.tick_params(labelsize=TITLE)
    bar.set_label('weight as a multiple of uniform attention', fontsize=TITLE)


def _legend(views: Sequence[LayerView], scale: Scale) -> list[Line2D]:
    marker = dict(color='none', markeredgecolor=INK, markeredgewidth=0.6)
    handles = [
        Line2D(
            [], [], marker='P', markersize=8, color='none', markerfacecolor=PAPER, markeredgecolor=INK, label='query'
        )
    ]
    if any(view.box is not None for view in views):
        handles.append(Line2D([], [], color='#777777', linestyle='--', label='reference box'))
    local = [view.level_names for view in views if view.is_local]
    for level, name in enumerate(max(local, key=len, default=())):
        handles.append(
            Line2D(
                [],
                [],
                marker=LEVEL_SHAPES[level % len(LEVEL_SHAPES)],
                markersize=7,
                label=name,
                markerfacecolor=LEVEL_COLORS[level % len(LEVEL_COLORS)],
                **marker,
            )
        )
    for share in (1, 0.3, 0.05) if local else ():
        handles.append(
            Line2D(
                [],
                [],
                marker='o',
                markersize=_area(share) ** 0.5,
                markerfacecolor='#777777',
                alpha=_opacity(share),
                label=f'weight {share * scale.largest:.2g}',
                **marker,
            )
        )
    if any(view.origin is not None for view in views):
        handles.append(Line2D([], [], color=INK, linewidth=0.8, alpha=0.7, label='displacement of a point'))
    return handles

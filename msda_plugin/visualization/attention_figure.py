"""Draws what a query attends to over the image: all layers, or one layer head by head."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from msda_plugin.visualization.attention import LayerView, QueryView

# The palette of Okabe and Ito, which is safe for color-blind readers, and marker shapes.
LEVEL_COLORS = ('#56b4e9', '#e69f00', '#009e73', '#cc79a7', '#f0e442', '#0072b2', '#d55e00')
LEVEL_SHAPES = 'os^Dv<>'
INK, PAPER, DETECTION = '#111111', '#ffffff', '#f0e442'
LARGEST, SMALLEST = 80, 3  # areas of markers, square points
ALL_MARKERS = 12000  # total marker area of a layer that attends to the whole image, square points
PANEL = 3.3  # width of a panel, inches
COLUMNS = (4, 5, 3)  # columns of panels, in order of preference


def draw_query(image: np.ndarray, query: QueryView, *, title: str = '') -> np.ndarray:
    """Draw a panel of the image with the query and the refinement of its box, and one or more panels per layer.

    Size and opacity of a point show its weight. Panels of multi-scale deformable attention share one weight scale and
    show the part of the image that encoder or decoder attend to. The other layers show the whole image, each panel with
    its own weight scale; heads with the same samples are averaged. Shunted attention has a panel per scale, DAT a panel
    per group, with lines from the original to the moved points.

    Args:
        image: (H, W, 3) uint8, RGB: the original image.
        query: from :class:`msda_plugin.visualization.attention.Recording`.
        title: title of the figure, before the query's label.

    Returns:
        The figure, (H', W', 3) uint8, RGB.
    """
    largest = _largest(query.layers)

    def overview(axis: Axes) -> None:
        _show(axis, image, whole(image.shape))
        _draw_boxes(axis, query)
        _draw_place(axis, query.at)
        axis.set_title('query' if query.box is None else 'references by decoder layer, detection')

    panels = [overview]
    for view in query.layers:
        window, name = layer_window(query, view, image.shape), f'{view.name}\n'
        if view.is_local:
            panels.append(_panel(image, view, window, largest, name + view.query))
        else:
            panels += [
                _panel(image, view, window, largest, name + view.level_names[level], view.level == level)
                for level in range(len(view.level_names))
            ]
    return _draw_panels(panels, image, _join(title, query.label), query.layers, largest)


def draw_heads(image: np.ndarray, query: QueryView, view: LayerView, *, title: str = '') -> np.ndarray:
    """Draw one layer: a panel of all heads, and one per head. Arguments and result as for :func:`draw_query`."""
    window, largest = layer_window(query, view, image.shape), _largest([view])
    panels = [_panel(image, view, window, largest, 'all heads')] if view.cells is None else []
    for head in np.unique(view.head):
        keep = view.head == head
        looks_at = '' if view.is_local else f', {view.level_names[view.level[keep][0]]}'
        panels.append(_panel(image, view, window, largest, f'head {head}{looks_at}', keep))
    return _draw_panels(panels, image, _join(title, f'{query.label} · {view.name}'), [view], largest)


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


def _largest(views: Sequence[LayerView]) -> float:
    """The largest weight of multi-scale deformable attention; 0 if there is no such layer."""
    return max((float(view.weight.max()) for view in views if view.is_local), default=0.0)


def _join(*parts: str) -> str:
    return ': '.join(part for part in parts if part)


def _panel(
    image: np.ndarray, view: LayerView, window: np.ndarray, largest: float, title: str, keep: np.ndarray | None = None
) -> Callable[[Axes], None]:
    """A function that draws a layer, or only the samples in `keep` (N,), into axes."""
    keep = np.ones(len(view.head), bool) if keep is None else keep

    def draw(axis: Axes) -> None:
        shown = view.merged(keep)
        _show(axis, image, window if view.is_local else whole(image.shape), pale=not view.is_local)
        scale = largest if view.is_local else shown.weight.max()
        (_draw_cells if view.cells is not None else _draw_points)(axis, shown, scale)
        if view.box is not None:
            _draw_box(axis, view.box, PAPER, '--')
        _draw_place(axis, view.at)
        axis.set_title(title if view.is_local else f'{title}, at most {scale:.2g}')

    return draw


def _show(axis: Axes, image: np.ndarray, window: np.ndarray, pale: bool = False) -> None:
    if pale:  # makes the colors of the samples visible
        image = (0.35 * 255 + 0.65 * image.mean(2, keepdims=True).repeat(3, 2)).astype(np.uint8)
    height, width = image.shape[:2]
    axis.imshow(image, extent=(0, width, height, 0), interpolation='nearest' if max(height, width) < 256 else 'auto')
    axis.set(xlim=window[::2], ylim=window[[3, 1]], xticks=[], yticks=[], facecolor='#888888')


def _draw_points(axis: Axes, view: LayerView, largest: float) -> None:
    if view.origin is not None:
        axis.add_collection(LineCollection(np.stack([view.origin, view.xy], 1), colors=INK, linewidths=0.5, alpha=0.5))
    for level in np.unique(view.level):
        of_level = np.flatnonzero(view.level == level)
        of_level = of_level[view.weight[of_level].argsort()]  # highest weight on top
        strength = (view.weight[of_level] / largest).clip(0, 1)
        marker = dict(s=_area(strength, marker_area(view)), marker=LEVEL_SHAPES[level % len(LEVEL_SHAPES)], zorder=3)
        # A light outline, visible on dark images.
        rim = 1 if view.is_local else 0.3
        axis.scatter(*view.xy[of_level].T, c=PAPER, alpha=0.4, edgecolors=PAPER, linewidths=1.4 * rim, **marker)
        axis.scatter(
            *view.xy[of_level].T,
            c=LEVEL_COLORS[level % len(LEVEL_COLORS)],
            alpha=_opacity(strength),
            edgecolors=INK,
            linewidths=0.6 * rim,
            **marker,
        )


def marker_area(view: LayerView) -> float:
    """Area of the largest marker, in square points."""
    return LARGEST if view.is_local else min(LARGEST, ALL_MARKERS / len(view.xy))


def _area(strength: np.ndarray | float, largest: float = LARGEST) -> np.ndarray | float:
    smallest = min(SMALLEST, largest / 8)
    return smallest + (largest - smallest) * strength


def _opacity(strength: np.ndarray) -> np.ndarray:
    return 0.3 + 0.6 * strength


def _draw_cells(axis: Axes, view: LayerView, largest: float) -> None:
    for level in np.unique(view.level):
        of_level = view.level == level
        size = view.cells[level]
        patches = [Rectangle(corner, *size) for corner in view.xy[of_level] - size / 2]
        colors = np.array(
            [
                _rgba(LEVEL_COLORS[level % len(LEVEL_COLORS)], 0.7 * strength)
                for strength in view.weight[of_level] / largest
            ]
        )
        axis.add_collection(PatchCollection(patches, facecolors=colors, edgecolors=(1, 1, 1, 0.35), linewidths=0.4))


def _rgba(color: str, alpha: float) -> tuple[float, float, float, float]:
    return *(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), alpha


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


def _draw_panels(
    panels: Sequence[Callable[[Axes], None]], image: np.ndarray, title: str, views: Sequence[LayerView], largest: float
) -> np.ndarray:
    columns = min(min(COLUMNS, key=lambda columns: -len(panels) % columns), len(panels))
    rows = -(-len(panels) // columns)
    height = PANEL * image.shape[0] / image.shape[1]
    handles = _legend(views, largest)
    legend_lines = -(-len(handles) // (2 * columns))
    figure = Figure(
        figsize=(PANEL * columns, (height + 0.4) * rows + 0.4 + 0.25 * legend_lines), dpi=110, layout='constrained'
    )
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis)
        axis.set_title(axis.get_title(), fontsize=7.5)
    for axis in axes[len(panels) :]:
        axis.axis('off')
    figure.legend(
        handles=handles, loc='outside lower center', ncols=2 * columns, fontsize=7.5, frameon=False, labelcolor=INK
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _legend(views: Sequence[LayerView], largest: float) -> list:
    marker = dict(color='none', markeredgecolor=INK, markeredgewidth=0.6)
    handles = [
        Line2D(
            [], [], marker='P', markersize=8, color='none', markerfacecolor=PAPER, markeredgecolor=INK, label='query'
        )
    ]
    if any(view.box is not None for view in views):
        handles.append(Line2D([], [], color='#777777', linestyle='--', label='reference box'))
    points = [view for view in views if view.cells is None]
    # If levels use the colors, DAT's groups are named by panel titles only.
    of_colors = [view for view in points if view.is_local] or points
    for level, name in enumerate(max((view.level_names for view in of_colors), key=len, default=())):
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
    for share in (1, 0.3, 0.05) if largest else ():
        handles.append(
            Line2D(
                [],
                [],
                marker='o',
                markersize=_area(share) ** 0.5,
                markerfacecolor='#777777',
                alpha=_opacity(share),
                label=f'weight {share * largest:.2g}',
                **marker,
            )
        )
    if any(view.origin is not None for view in views):
        handles.append(Line2D([], [], color=INK, linewidth=0.8, alpha=0.7, label='displacement of a point'))
    if len(points) < len(views):
        handles.append(Patch(facecolor=LEVEL_COLORS[0], edgecolor='#777777', label='cells: opacity shows the weight'))
    return handles

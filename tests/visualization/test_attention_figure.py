"""Location and size of drawn samples, windows, and figures of small and large images."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msda_plugin.visualization import draw_heads, draw_query
from msda_plugin.visualization.attention import LayerView, QueryView
from msda_plugin.visualization.attention_figure import (
    LEVEL_COLORS,
    Panel,
    Scale,
    _draw_panel,
    _figure,
    layer_window,
    whole,
)


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def points_view(
    xy, weight, *, level=None, kind='decoder', at=(50.0, 40.0), box=(30.0, 20.0, 70.0, 60.0), name='decoder.0'
):
    count = len(weight)
    return LayerView(
        name=name,
        kind=kind,
        query='decoder query 7',
        at=np.array(at),
        box=None if box is None else np.array(box),
        head=np.arange(count) % 2,
        level=np.zeros(count, int) if level is None else np.array(level),
        xy=np.array(xy, float),
        weight=np.array(weight, float),
        level_names=('level 0, 10×12', 'level 1, 5×6'),
    )


def cells_view():
    x, y = np.meshgrid(np.arange(4) * 25 + 12.5, np.arange(2) * 40 + 20)
    xy = np.column_stack([x.ravel(), y.ravel()])
    weight = np.zeros(8)
    weight[6] = 1
    return LayerView(
        name='backbone.0',
        kind='shunted',
        query='token 3',
        at=np.array([50.0, 40.0]),
        box=None,
        head=np.zeros(8, int),
        level=np.zeros(8, int),
        xy=xy,
        weight=weight,
        level_names=('2×2 merged',),
        cells=np.array([[25.0, 40.0]]),
    )


def render(view, size=(100, 80), scale=4):
    """The panel of a view over a black image, without margins: (H, W, 3), `scale` pixels per image pixel."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    figure = Figure(figsize=(size[0] * scale / 100, size[1] * scale / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    panel = Panel.of(view, whole(image.shape), ())
    _draw_panel(axis, image, panel, Scale.of([panel]))
    axis.axis('off')
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def like(figure, color, tolerance=70):
    return np.abs(figure - rgb(color)).sum(2) < tolerance


@pytest.mark.parametrize('place', [(20, 60), (90.5, 10.25)])
def test_a_point_is_drawn_at_its_location(place):
    figure = render(points_view([place], [1.0], level=[1], at=(50, 40), box=None))
    rows, columns = np.nonzero(like(figure, LEVEL_COLORS[1]))
    assert len(rows) > 20
    np.testing.assert_allclose(
        [(columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2], np.array(place) * 4, atol=1
    )


def test_marker_size_shows_the_weight():
    figure = render(points_view([(20, 20), (80, 60)], [0.8, 0.2], box=None))
    sizes = [
        like(figure[rows, columns], LEVEL_COLORS[0], 200).sum()
        for rows, columns in ((slice(40, 120), slice(40, 120)), (slice(200, 280), slice(280, 360)))
    ]
    assert sizes[0] > 2 * sizes[1] > 0


def test_a_cell_covers_its_area():
    figure = render(cells_view())
    # On the black image, cells of weight 0 are gray and the cell of weight 1 is colored.
    colored = figure.max(2) - figure.min(2) > 40
    rows, columns = np.nonzero(colored)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((200, 299, 160, 319), abs=2)


def test_the_window_contains_samples_and_references_of_all_layers_of_a_kind():
    first = points_view([(48, 40), (52, 40), (200, 200)], [0.6, 0.39, 0.01], at=(50, 40), box=(45, 35, 55, 45))
    second = points_view([(60, 42)], [1.0], at=(50, 40), box=None, name='decoder.1')
    far = points_view([(5, 75)], [1.0], kind='encoder', box=None)
    query = QueryView('detection 0', np.array([50.0, 40]), np.array([45.0, 35, 55, 45]), (far, first, second))
    window = layer_window(query, first, (80, 100, 3))
    np.testing.assert_array_equal(window, layer_window(query, second, (80, 100, 3)))
    left, top, right, bottom = window
    assert left <= 45 and top <= 35 and right >= 60 and bottom >= 45  # the box, and the point of the second layer
    assert right < 100 and bottom < 80  # but not the distant point with 1% of the weight
    assert (right - left) / (bottom - top) == pytest.approx(100 / 80)
    np.testing.assert_array_equal(layer_window(query, cells_view(), (80, 100, 3)), (0, 0, 100, 80))


def test_the_window_is_the_image_if_the_samples_cover_it():
    view = points_view([(1, 1), (99, 79)], [0.5, 0.5])
    query = QueryView('detection 0', np.array([50.0, 40]), None, (view,))
    np.testing.assert_array_equal(layer_window(query, view, (80, 100, 3)), (0, 0, 100, 80))


@pytest.mark.parametrize('size', [(128, 128), (1333, 800), (300, 1000)])
def test_figures_of_all_layers_and_of_all_heads(size):
    width, height = size
    image = np.full((height, width, 3), 128, np.uint8)
    views = (
        cells_view(),
        points_view([(50, 40), (60, 50)], [1, 1], kind='encoder', box=None),
        points_view([(50, 40), (60, 50)], [1, 1]),
    )
    query = QueryView('detection 0: cat 0.90', np.array([50.0, 40]), np.array([30.0, 20, 70, 60]), views)
    figure, heads = draw_query(image, query, title='image'), draw_heads(image, query, views[-1])
    for result in (figure, heads):
        assert result.dtype == np.uint8 and result.ndim == 3 and result.shape[2] == 3
        assert 300 < result.shape[1] < 2000 and result.shape[0] < 3000
    assert like(figure, LEVEL_COLORS[0], 120).any() and like(heads, LEVEL_COLORS[0], 120).any()


def even_view(columns, rows, weight=None, name='backbone.0'):
    """One head on a grid of cells, with equal weights by default."""
    count = columns * rows
    x, y = np.meshgrid((np.arange(columns) + 0.5) * 100 / columns, (np.arange(rows) + 0.5) * 80 / rows)
    return LayerView(
        name=name,
        kind='shunted',
        query='token 3',
        at=np.array([50.0, 40.0]),
        box=None,
        head=np.zeros(count, int),
        level=np.zeros(count, int),
        xy=np.column_stack([x.ravel(), y.ravel()]),
        weight=np.full(count, 1 / count) if weight is None else np.array(weight),
        level_names=(f'{rows}×{columns}',),
        cells=np.array([[100 / columns, 80 / rows]]),
    )


def test_the_uniform_weight_depends_on_the_samples_of_a_head():
    view = points_view([(1, 1), (2, 2), (3, 3)], [0.5, 1, 0.5])  # heads 0, 1, 0
    np.testing.assert_array_equal(view.uniform, [0.5, 1, 0.5])


@pytest.mark.parametrize(
    'weight, lines',
    [
        (None, ('max weight 0.25, uniform 0.25', 'nearly uniform')),
        ([0.25, 0.28, 0.25, 0.22], ('max weight 0.28, uniform 0.25', 'nearly uniform')),
        ([0.7, 0.1, 0.1, 0.1], ('max weight 0.7, uniform 0.25',)),
    ],
)
def test_titles_name_the_largest_and_the_uniform_weight(weight, lines):
    assert Panel.of(even_view(2, 2, weight), whole((80, 100, 3)), ('a', 'b')).title == ('a', 'b', *lines)


def test_panels_share_one_color_scale():
    even, fine, peaked = (
        Panel.of(view, whole((80, 100, 3)), ())
        for view in (even_view(2, 2), even_view(10, 8), even_view(2, 4, [0.9, 0.1, 0, 0, 0, 0, 0, 0]))
    )
    scale = Scale.of([even, fine, peaked])
    assert scale.multiple == pytest.approx(0.9 * 8)
    np.testing.assert_allclose(scale.strength(even), scale.strength(fine)[:4])  # both are uniform
    *rest, second, first = sorted(scale.strength(peaked))
    assert first == 1 and rest == [0] * 6 and 0 < second < scale.strength(even)[0]
    figure = _figure([even, fine, peaked], np.zeros((80, 100, 3), np.uint8), 'title')
    (bar,) = [axis for axis in figure.axes if axis.get_xlabel()]
    assert [label.get_text() for label in bar.get_xticklabels()] == ['at most 0.25', '1: uniform', '2', '4', '7.2']
    assert Scale.of([even]).multiple == 4  # a uniform map alone does not get the strongest color


@pytest.mark.parametrize('size', [(128, 128), (1333, 300), (300, 1000)])
@pytest.mark.parametrize('panels', [1, 3, 13])
def test_no_text_overlaps_or_is_cut_off(size, panels):
    width, height = size
    name = 'panoptic_head.pixel_decoder.encoder.layers.5.self_attn.with_a_long_name'
    views = [even_view(3, 2, name=name), points_view([(50, 40), (60, 50)], [1, 1], name=name)] * panels
    image = np.zeros((height, width, 3), np.uint8)
    drawn = [Panel.of(view, whole(image.shape), (view.name, 'not merged, 100×134, mean of 16 heads')) for view in views]
    figure = _figure(drawn[:panels], image, 'a_photo_with_a_long_name: detection 0: traffic light 0.50 · ' + name)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    titles = [axis.title.get_window_extent(renderer) for axis in figure.axes if axis.get_title()]
    boxes = titles + [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [axis.get_window_extent(renderer) for axis in figure.axes]
    boxes += [axis.xaxis.get_tightbbox(renderer) for axis in figure.axes if axis.get_xlabel()]
    assert len(titles) == panels
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(overlap) < 1

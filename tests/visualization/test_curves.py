"""Panels of training curves."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from msda_plugin.visualization import curves
from msda_plugin.visualization.curves import MAX_POINTS, _binned, draw_curves

LOSSES = {'loss': (np.arange(1, 6), np.array([5.0, 4, 3, 2, 1]))}
ACCURACY = {'AP': [0.1, np.nan, 0.3], 'AP50': [0.2, 0.3, 0.5]}
POSITIONS = {'epoch': [1, 2, 3], 'minutes': [0.5, 1.0, 1.5]}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    made = []
    monkeypatch.setattr(curves, 'Figure', lambda *args, **kwargs: made.append(Figure(*args, **kwargs)) or made[-1])
    return made


def test_one_panel_for_losses_and_one_for_accuracy():
    two = draw_curves(LOSSES, ACCURACY, POSITIONS, title='run')
    assert two.dtype == np.uint8 and two.shape[2] == 3
    for one in (draw_curves({}, ACCURACY, POSITIONS), draw_curves(LOSSES, {}, POSITIONS)):
        assert two.shape[1] == 2 * one.shape[1]
    assert len(np.unique(two.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize('minutes', [[0.5, 1.0, 1.5], [3, 4, 11]])
def test_the_second_positions_are_a_scale_above_the_panel(figures, minutes):
    draw_curves({}, ACCURACY, {'epoch': [1, 2, 3], 'minutes': minutes})
    (axis,) = figures[0].axes
    (scale,) = axis.child_axes
    assert (axis.get_xlabel(), scale.get_xlabel()) == ('epoch', 'minutes')
    forward, inverse = scale._functions
    np.testing.assert_allclose(forward(np.array([1, 2, 3])), minutes)
    np.testing.assert_allclose(inverse(forward(np.array([0, 0.3, 2.5, 3.18]))), [0, 0.3, 2.5, 3.18])


@pytest.mark.parametrize('minutes', [[0.0, 0.0, 0.0], [1, 1, 2]])
def test_no_scale_without_time_between_validations(figures, minutes):
    draw_curves({}, ACCURACY, {'epoch': [1, 2, 3], 'minutes': minutes})
    assert not figures[0].axes[0].child_axes


@pytest.mark.parametrize('validations', [1, 3])
def test_legends_cover_nothing(figures, validations):
    accuracy = {name: values[-validations:] for name, values in ACCURACY.items()}
    positions = {name: values[-validations:] for name, values in POSITIONS.items()}
    draw_curves(LOSSES, accuracy, positions, train_accuracy=accuracy, title='a long title ' * 6)
    (figure,) = figures
    boxes = [axis.get_legend().get_window_extent() for axis in figure.axes]
    for axis, legend in zip(figure.axes, boxes, strict=True):
        assert not axis.texts  # labels in the panel would lie on lines
        assert not any(legend.overlaps(other.get_window_extent()) for other in figure.axes)
        assert legend.y1 < axis.xaxis.label.get_window_extent().y0
        assert 0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and 0 <= legend.y0
    assert not boxes[0].overlaps(boxes[1])


def test_accuracy_on_training_images_is_dashed_in_the_same_color(figures):
    draw_curves({}, ACCURACY, POSITIONS, train_accuracy={'AP50': [0.3, 0.9, np.nan]})
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    trained, validated = lines['AP50, training images: 0.900'], lines['AP50: best 0.500, last 0.500']
    assert trained.get_linestyle() == '--' and trained.get_color() == validated.get_color()
    np.testing.assert_array_equal(trained.get_ydata(), [0.3, 0.9, np.nan])


def test_values_change_the_figure():
    other = {'AP': [0.1, 0.9, 0.3]}
    assert (draw_curves({}, {'AP': [0.1, 0.2, 0.3]}, POSITIONS) != draw_curves({}, other, POSITIONS)).any()


def test_nothing_to_draw():
    with pytest.raises(ValueError, match='neither losses nor accuracies'):
        draw_curves({'loss': ([], [])}, {}, {})


def test_a_metric_of_nan_only():
    draw_curves({}, {'AP': [np.nan, np.nan, np.nan]}, POSITIONS)


def test_long_curves_are_averaged():
    iterations = np.arange(1, 10001)
    x, y = _binned(iterations, 2.0 * iterations)
    assert len(x) == len(y) == MAX_POINTS
    np.testing.assert_allclose(y, 2 * x)
    np.testing.assert_allclose(x.mean(), iterations.mean())


def test_a_title_without_glyphs_does_not_warn(recwarn):
    draw_curves(LOSSES, {}, POSITIONS, title='猫')
    assert not list(recwarn)

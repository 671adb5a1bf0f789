"""Panels of training curves."""

import numpy as np
import pytest

from msda_plugin.visualization.curves import MAX_POINTS, _binned, draw_curves

LOSSES = {'loss': (np.arange(1, 6), np.array([5.0, 4, 3, 2, 1]))}
ACCURACY = {'AP': [0.1, np.nan, 0.3], 'AP50': [0.2, 0.3, 0.5]}
POSITIONS = {'epoch': [1, 2, 3], 'minutes': [0.5, 1.0, 1.5]}


def test_one_panel_for_losses_and_one_per_axis():
    three = draw_curves(LOSSES, ACCURACY, POSITIONS, title='run')
    assert three.dtype == np.uint8 and three.shape[2] == 3
    two, one = draw_curves({}, ACCURACY, POSITIONS), draw_curves(LOSSES, {}, POSITIONS)
    assert three.shape[1] == 3 * one.shape[1] and two.shape[1] == 2 * one.shape[1]
    assert len(np.unique(three.reshape(-1, 3), axis=0)) > 50


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

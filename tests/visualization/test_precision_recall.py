"""Precision-recall curves."""

import numpy as np

from msda_plugin.visualization.precision_recall import draw_precision_recall

RECALLS = np.linspace(0, 1, 101)
RED, BLUE, GRAY, BLACK = (230, 20, 20), (20, 20, 230), (204, 204, 204), (0, 0, 0)


def rows(figure, color):
    """Mean row of the pixels of a color."""
    return np.nonzero((np.abs(figure.astype(int) - color) < 8).all(axis=-1))[0].mean()


def test_curves():
    precisions = np.column_stack([np.full(101, 0.9), np.full(101, 0.3), np.full(101, 0.5), np.full(101, np.nan)])
    figure = draw_precision_recall(RECALLS, precisions, {0: RED, 1: BLUE, 3: (0, 255, 0)})
    assert figure.dtype == np.uint8 and figure.shape[2] == 3
    assert rows(figure, RED) < rows(figure, GRAY) < rows(figure, BLUE)
    assert not (figure == (0, 255, 0)).all(axis=-1).any()  # a class without boxes
    mean = (np.abs(figure.astype(int)) < 8).all(axis=-1).sum(axis=1)
    height = {0.9: rows(figure, RED), 0.3: rows(figure, BLUE)}
    expected = height[0.3] + (17 / 30 - 0.3) / 0.6 * (height[0.9] - height[0.3])
    inner = mean[60:-80]  # without the frame
    assert abs(60 + inner.argmax() - expected) < 4


def test_one_class_has_no_mean():
    figure = draw_precision_recall(RECALLS, np.full((101, 1), 0.5), {0: RED})
    assert (figure[60:-80, 120:-60] < 8).all(axis=-1).mean() < 0.001
    assert rows(figure, RED) > 0

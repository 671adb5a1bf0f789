"""Precision-recall curves."""

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_precision_recall(
    recalls: np.ndarray, precisions: np.ndarray, colors: Mapping[int, tuple[int, int, int]]
) -> np.ndarray:
    """Draw a curve for each class, and their mean as a thick black one. There is no legend, since names may be long.

    Args:
        recalls: (R,), 0-1.
        precisions: (R, C), 0-1; NaN for a class without boxes, which gets no curve.
        colors: RGB colors, 0-255, of classes by their index; the others are gray.

    Returns:
        The figure, (H, W, 3) uint8, RGB.
    """
    figure = Figure(figsize=(6.4, 4.6), dpi=120, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    known = ~np.isnan(precisions).any(axis=0)
    for label in sorted(np.flatnonzero(known), key=lambda label: label in colors):  # colors above gray
        color = tuple(channel / 255 for channel in colors[label]) if label in colors else '0.8'
        axis.plot(recalls, precisions[:, label], color=color, linewidth=1.5 if label in colors else 0.8, clip_on=False)
    if known.sum() > 1:
        axis.plot(recalls, precisions[:, known].mean(axis=1), color='black', linewidth=3, clip_on=False)
    axis.set(xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""Training curves: losses by iteration, and accuracy by epoch and minutes."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STEPS = (1, 2, 5, 10)  # between the ticks, times a power of ten
MAX_POINTS = 250  # points per loss curve; more iterations are averaged in bins


def draw_curves(
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    accuracy: Mapping[str, Sequence[float]],
    positions: Mapping[str, Sequence[float]],
    *,
    train_accuracy: Mapping[str, Sequence[float]] | None = None,
    title: str = '',
) -> np.ndarray:
    """Draw a panel of losses and a panel of accuracies, each with its legend below.

    Args:
        losses: Iterations and values of each loss by its name, (num_iterations,) each. The first has the thickest line.
        accuracy: Values of each metric by its name, (num_validations,), 0-1. A ring marks the best value.
        positions: Positions of the validations, (num_validations,), by their label, e.g. ``{'epoch': [1, 2], 'minutes':
            [0.7, 1.4]}``: the first is the horizontal axis, the second a scale above the panel.
        train_accuracy: Like ``accuracy``, on training images; a dashed line in the color of the same metric.
        title: Title of the figure.

    Returns:
        The figure, (H, W, 3) uint8, RGB.

    Raises:
        ValueError: If there are neither losses nor accuracies.
    """
    losses = {name: points for name, points in losses.items() if len(points[1])}
    accuracy = {name: values for name, values in accuracy.items() if len(values)}
    panels = bool(losses) + bool(accuracy)
    if not panels:
        raise ValueError('there are neither losses nor accuracies to draw')
    figure = Figure(figsize=(6.4 * panels, 5.0), dpi=120, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if title:
        figure.suptitle(title)
    if losses:
        _draw_losses(axes[0], losses)
    if accuracy:
        _draw_accuracy(axes[-1], accuracy, positions, train_accuracy or {})
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from font', UserWarning)  # of the title
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_losses(axis: Axes, losses: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    for index, (name, (iterations, values)) in enumerate(losses.items()):
        axis.plot(*_binned(iterations, values), linewidth=2.2 if index == 0 else 1.2, label=name)
    axis.set(xlabel='iteration', ylabel='loss', title='Training loss', ylim=(0, None))
    _finish(axis, columns=4)


def _draw_accuracy(
    axis: Axes,
    accuracy: Mapping[str, Sequence[float]],
    positions: Mapping[str, Sequence[float]],
    train_accuracy: Mapping[str, Sequence[float]],
) -> None:
    (label, at), *second = positions.items()
    colors = {}
    for name, values in accuracy.items():
        values = np.asarray(values, float)
        best = np.nan if np.isnan(values).all() else np.nanmax(values)
        (line,) = axis.plot(
            at, values, 'o-', markersize=4, clip_on=False, label=f'{name}: best {best:.3f}, last {_last(values):.3f}'
        )
        colors[name] = line.get_color()
        axis.plot(
            np.asarray(at)[values == best][:1],
            values[values == best][:1],
            'o',
            markersize=9,
            fillstyle='none',
            color=colors[name],
            clip_on=False,
        )
    for name, values in train_accuracy.items():
        axis.plot(
            at,
            values,
            '.--',
            color=colors.get(name),
            alpha=0.8,
            clip_on=False,
            label=f'{name}, training images: {_last(values):.3f}',
        )
    axis.set(xlabel=label, ylabel='average precision', title='Validation', ylim=(0, 1), xlim=(0, 1.06 * max(at)))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=STEPS))
    if second and (np.diff([0.0, *at]) > 0).all() and (np.diff([0.0, *second[0][1]]) > 0).all():
        _add_scale(axis, at, *second[0])
    _finish(axis, columns=1 + bool(train_accuracy))


def _add_scale(axis: Axes, at: Sequence[float], label: str, values: Sequence[float]) -> None:
    """A scale above the panel that shows ``values`` at the positions ``at``, both rising from above 0."""
    # Beyond the last validation, the scale goes on in proportion.
    below, above = ([0.0, *points, 2.0 * points[-1]] for points in (at, values))
    scale = axis.secondary_xaxis(
        'top', functions=(lambda x: np.interp(x, below, above), lambda x: np.interp(x, above, below))
    )
    scale.set_xlabel(label)
    scale.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=STEPS))


def _last(values: Sequence[float]) -> float:
    """The last value that is not NaN: a resumed training may lack some."""
    known = [value for value in values if not np.isnan(value)]
    return known[-1] if known else np.nan


def _finish(axis: Axes, columns: int) -> None:
    """A grid, and the legend below the panel, where it covers no line."""
    axis.grid(alpha=0.3)
    axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.13), ncols=columns, fontsize=9, frameon=False)


def _binned(iterations: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring points in at most ``MAX_POINTS`` bins."""
    bins = min(MAX_POINTS, len(values))
    return tuple(
        np.array([part.mean() for part in np.array_split(np.asarray(array, float), bins)])
        for array in (iterations, values)
    )

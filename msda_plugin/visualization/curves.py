"""Training curves: losses by iteration, and accuracy by epoch and by minutes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 250  # points per loss curve; more iterations are averaged in bins


def draw_curves(
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    accuracy: Mapping[str, Sequence[float]],
    positions: Mapping[str, Sequence[float]],
    *,
    title: str = '',
) -> np.ndarray:
    """Draw one panel of losses, and one accuracy panel for each horizontal axis.

    Args:
        losses: Iterations and values of each loss by its name, (num_iterations,) each. The first has the thickest line.
        accuracy: Values of each metric by its name, (num_validations,), 0-1.
        positions: Positions of the validations, (num_validations,), by the label of the accuracy panel's horizontal
            axis, e.g. ``{'epoch': [1, 2], 'minutes': [0.7, 1.4]}``.
        title: Title of the figure.

    Returns:
        The figure, (H, W, 3) uint8, RGB.

    Raises:
        ValueError: If there are neither losses nor accuracies.
    """
    losses = {name: points for name, points in losses.items() if len(points[1])}
    accuracy = {name: values for name, values in accuracy.items() if len(values)}
    panels = bool(losses) + (len(positions) if accuracy else 0)
    if not panels:
        raise ValueError('there are neither losses nor accuracies to draw')
    figure = Figure(figsize=(5.2 * panels, 4.0), dpi=120, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if title:
        figure.suptitle(title)

    if losses:
        axis = axes.pop(0)
        for index, (name, (iterations, values)) in enumerate(losses.items()):
            axis.plot(*_binned(iterations, values), linewidth=2.2 if index == 0 else 1.2, label=name)
        axis.set(xlabel='iteration', ylabel='loss', title='Training loss', ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    for axis, (label, at) in zip(axes, positions.items() if accuracy else (), strict=True):
        for name, values in accuracy.items():
            (line,) = axis.plot(at, values, marker='o', markersize=4, label=f'{name} (last {values[-1]:.3f})')
            best = int(np.nanargmax(values)) if not np.isnan(values).all() else 0
            axis.annotate(
                f'{values[best]:.3f}',
                (at[best], values[best]),
                (0, 6),
                textcoords='offset points',
                ha='center',
                color=line.get_color(),
                fontsize=9,
            )
        axis.set(
            xlabel=label,
            ylabel='average precision',
            title=f'Validation by {label}',
            ylim=(0, 1),
            xlim=(0, 1.06 * max(at)),
        )
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=label != 'minutes'))
        axis.legend(loc='best')
        axis.grid(alpha=0.3)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _binned(iterations: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring points in at most ``MAX_POINTS`` bins."""
    bins = min(MAX_POINTS, len(values))
    return tuple(
        np.array([part.mean() for part in np.array_split(np.asarray(array, float), bins)])
        for array in (iterations, values)
    )

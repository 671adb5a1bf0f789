"""D-FINE's distributions of the edges of a box, layer by layer."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msda_plugin.visualization.attention_figure import LEVEL_COLORS

EDGES = ('left', 'upper', 'right', 'lower')


def draw_edges(probabilities: np.ndarray, distances: np.ndarray, *, title: str = '') -> np.ndarray:
    """Draw the distribution of each edge after each decoder layer, and its mean.

    Args:
        probabilities: (num_layers, 4, num_bins), of the left, upper, right and lower edge.
        distances: (num_bins,), how far a bin moves the edge outwards from the initial box, as a share of its width or
            height.
        title: title of the figure.

    Returns:
        The figure, (H, W, 3) uint8, RGB.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if probabilities.ndim != 3 or probabilities.shape[1:] != (4, len(distances)):
        raise ValueError(
            f'probabilities have the shape {probabilities.shape}, distances {distances.shape}; expected (num_layers, '
            '4, num_bins) and (num_bins,)'
        )
    figure = Figure(figsize=(12.8, 3.2), dpi=120, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    places = np.arange(len(distances))  # bins at equal distances: near 0 they are too narrow to see
    ticks = np.unique(np.linspace(0, len(distances) - 1, 9).round().astype(int))
    axes = figure.subplots(1, 4, sharey=True)
    for edge, axis in enumerate(axes):
        for layer, probability in enumerate(probabilities[:, edge]):
            color = LEVEL_COLORS[layer % len(LEVEL_COLORS)]
            mean = probability @ distances
            axis.plot(places, probability, color=color, linewidth=1.4, label=f'layer {layer}: {100 * mean:+.1f} %')
            axis.axvline(np.interp(mean, distances, places), color=color, linestyle='--', linewidth=0.9)
        axis.set(title=f'{EDGES[edge]} edge', xlabel='moves outwards by % of the box')
        axis.set_xticks(ticks, [f'{100 * distances[tick]:.0f}' for tick in ticks])
        axis.legend(fontsize=7)
    axes[0].set(ylabel='probability', ylim=(0, 1.05 * probabilities.max()))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""SVG figures of benchmark results: speedups, and time against resolution."""

import io
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

FASTER, SLOWER, INK, FAINT = '#0072b2', '#d55e00', '#222222', '#777777'
LINES = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#222222', '#8c564b')
MARKERS = 'os^Dv<>P'
WIDTH = 9.0  # inches


def draw_speeds(labels: Sequence[str], speeds: Sequence[float], notes: Sequence[str], *, sides: tuple[str, str]) -> str:
    """Draw the speedup of each case as a bar that starts at 1, on a logarithmic axis.

    Args:
        labels: Names of the n cases.
        speeds: n speedups > 0; bars of those below 1 go to the left, in another color.
        notes: n texts to the right of the bars.
        sides: Names of the stock implementation and of the one whose speedup is drawn.

    Returns:
        An SVG document.
    """
    figure, axis = _figure(0.3 * len(labels) + 0.75)
    rows = range(len(labels))
    axis.barh(
        rows,
        [speed - 1 for speed in speeds],
        left=1,
        height=0.62,
        color=[FASTER if speed >= 1 else SLOWER for speed in speeds],
    )
    for row, speed, note in zip(rows, speeds, notes, strict=True):
        place = dict(xy=(max(speed, 1), row), textcoords='offset points', va='center')
        axis.annotate(times(speed), xytext=(6, 0), fontsize=9, color=INK, fontweight='bold', **place)
        axis.annotate(note, xytext=(50, 0), fontsize=8, color=FAINT, **place)
    axis.set_yticks(rows, labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    _speed_axis(axis, speeds, room=0.6, label=f'times as fast: {sides[1]} against {sides[0]}')
    return _svg(figure)


def times(ratio: float) -> str:
    """1.304 → '1.30×', 39.42 → '39.4×'"""
    return f'{ratio:.2f}×' if ratio < 9.995 else f'{ratio:.1f}×' if ratio < 99.95 else f'{ratio:.0f}×'


def draw_overview(speeds: Mapping[str, Sequence[float]]) -> str:
    """Draw the speedups of each part as dots on a line; returns an SVG document."""
    figure, axis = _figure(0.42 * len(speeds) + 0.75)
    for row, values in enumerate(speeds.values()):
        axis.plot([min(values), max(values)], [row, row], color=FASTER, linewidth=2, alpha=0.35)
        axis.scatter(
            values,
            [row] * len(values),
            s=42,
            alpha=0.75,
            edgecolors='white',
            linewidths=0.6,
            zorder=3,
            c=[FASTER if value >= 1 else SLOWER for value in values],
        )
    axis.set_yticks(range(len(speeds)), speeds)
    axis.set_ylim(len(speeds) - 0.5, -0.5)
    _speed_axis(
        axis,
        [value for values in speeds.values() for value in values],
        room=0.1,
        label='times as fast as the stock implementation, each case a dot',
    )
    return _svg(figure)


def draw_growth(
    pixels: Sequence[int], seconds: Mapping[str, Sequence[float]], exponents: Mapping[str, float]
) -> Figure:
    """Draw the time of each layer against the number of pixels of its map, both logarithmic.

    Args:
        pixels: n numbers of pixels.
        seconds: Layer name -> n times.
        exponents: Layer name -> the b of time ~ pixels^b.
    """
    figure, axis = _figure(4.6)
    for index, (name, values) in enumerate(seconds.items()):
        axis.loglog(
            pixels,
            [second * 1e3 for second in values],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            color=LINES[index % len(LINES)],
            label=f'{name}: pixels^{exponents[name]:.2f}',
        )
    axis.set(xlabel='pixels of the map', ylabel='milliseconds')
    axis.grid(which='both', alpha=0.25)
    axis.legend(fontsize=8, loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def growth_svg(pixels: Sequence[int], seconds: Mapping[str, Sequence[float]], exponents: Mapping[str, float]) -> str:
    """:func:`draw_growth` as an SVG document."""
    return _svg(draw_growth(pixels, seconds, exponents))


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=120, layout='constrained')
    axis = figure.subplots()
    axis.spines[['top', 'right']].set_visible(False)
    return figure, axis


def _speed_axis(axis: Axes, speeds: Sequence[float], room: float, label: str) -> None:
    """Make the x-axis a logarithmic axis of ratios with a line at 1; ``room``: free part on its right."""
    low, high = min(*speeds, 1), max(*speeds, 1.5)
    axis.set_xscale('log')
    span = high / low
    axis.set_xlim(low / span**0.03, high * span ** (0.1 + room))
    axis.axvline(1, color=INK, linewidth=1)
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if span < 3 else (1, 2, 5) if span < 200 else (1,)
    ticks = [step * 10**power for power in range(-3, 6) for step in steps]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.05 <= tick <= high * 1.05]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}×'))
    axis.tick_params(labelsize=9)
    axis.set_xlabel(label, fontsize=9, color=FAINT)
    axis.grid(axis='x', alpha=0.25)
    axis.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    """The figure as SVG, with text as outlines and without date or random names, for reproducible output."""
    file = io.StringIO()
    with rc_context({'svg.fonttype': 'path', 'svg.hashsalt': 'msda_plugin'}):
        figure.savefig(file, format='svg', metadata=dict(Date=None, Creator=None))
    text = file.getvalue()
    return text[text.index('<svg') :]  # without the document type, which refers to a URL

"""Benchmark results: cases, each measured with two implementations in the same run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Measurement(NamedTuple):
    """One implementation in one case.

    Attributes:
        seconds: Median of the timed runs.
        peak: Peak memory in bytes: resident set of a process, or allocations on a GPU; None: not measured.
        attention: Seconds of a run spent in attention layers; None: not measured.
    """

    seconds: float
    peak: int | None = None
    attention: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One case with both implementations.

    Attributes:
        case: What is computed: a shape of the operator, a layer, a model.
        run: How it is run: 'forward', 'training step'.
        sides: Names of the two implementations, such as ('mmcv', 'ours').
        stock, ours: Their measurements.
        difference: Largest difference between their results, relative to the largest result, and of a model's raw
            outputs absolute; None: not compared.
    """

    case: str
    run: str
    sides: tuple[str, str]
    stock: Measurement
    ours: Measurement
    difference: float | None = None

    @property
    def speed(self) -> float:
        """Time of the stock implementation divided by ours."""
        return self.stock.seconds / self.ours.seconds

    @property
    def memory(self) -> float | None:
        """Our peak memory divided by that of the stock implementation."""
        return None if self.stock.peak is None or self.ours.peak is None else self.ours.peak / self.stock.peak

    def milliseconds(self, digits: int = 2) -> str:
        """Columns of a table: both times in milliseconds, and their ratio with this number of digits."""
        return f'{self.stock.seconds * 1e3:>10.2f}{self.ours.seconds * 1e3:>10.2f}{self.speed:>7.{digits}f}x'

    def lines(self) -> Iterator[tuple[str, str, Measurement]]:
        """One line of a table for each side: its name; columns of seconds, MB, speed and memory; its measurement."""
        ratios = ((1.0, 1.0), (self.speed, self.memory))
        for side, measured, (speed, memory) in zip(self.sides, (self.stock, self.ours), ratios, strict=True):
            yield side, f'{measured.seconds:>9.3f}{measured.peak / 1e6:>8.0f}{speed:>7.2f}x{memory:>8.0%}', measured

"""What a benchmark yields: cases, each measured in two implementations in the same run."""

from dataclasses import dataclass
from typing import NamedTuple


class Measurement(NamedTuple):
    """One implementation in one case.

    Attributes:
        seconds: median of the timed runs.
        peak: bytes, the largest resident set of a process, or allocation of a GPU; None: not measured.
        attention: seconds of a run that its attention layers take; None: not measured.
    """

    seconds: float
    peak: int | None = None
    attention: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One case in both implementations.

    Attributes:
        case: what is computed: a shape of the operator, a layer, a model.
        run: what is done with it: 'forward', 'training step'.
        sides: names of the two implementations, such as ('mmcv', 'ours').
        stock, ours: what was measured of each.
        difference: largest difference of their results, as a part of the largest result; None: not compared here.
    """

    case: str
    run: str
    sides: tuple[str, str]
    stock: Measurement
    ours: Measurement
    difference: float | None = None

    @property
    def speed(self) -> float:
        """How many times as fast ours is."""
        return self.stock.seconds / self.ours.seconds

    @property
    def memory(self) -> float | None:
        """Our peak memory as a part of the stock one."""
        return None if self.stock.peak is None or self.ours.peak is None else self.ours.peak / self.stock.peak

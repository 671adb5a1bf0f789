"""Median times of functions.

`torch.utils.benchmark.Timer` chooses the number of runs, averages short calls over a block and measures one statement
after another. Here the user sets the number of runs (``--repeats``) and two implementations can alternate, so that a
slow phase of the machine affects both.
"""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


class Timer:
    """Median seconds of calls, after calls that are not counted.

    Args:
        device: Device that the functions run on; a GPU is synchronized before the clock is read.
        repeats: Number of timed runs.
        warm_up: Minimum seconds of uncounted calls; there is always at least one.
    """

    def __init__(self, device: torch.device, repeats: int, warm_up: float = 0.0) -> None:
        self.device = device
        self.repeats = repeats
        self.warm_up = warm_up

    def __call__(self, *functions: Callable[[], object]) -> list[float]:
        """Median seconds of each function, measured one after another: caches are as in a loop of that function."""
        return [self.median(function) for function in functions]

    def in_turn(self, *functions: Callable[[], object]) -> list[float]:
        """Median seconds of each function, in alternation: a slow phase of the machine affects all of them."""
        rounds = [[self.once(function) for function in functions] for _ in range(self.repeats + 1)]
        return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]

    def median(self, function: Callable[..., object], prepare: Callable[[], object] | None = None) -> float:
        """Median seconds of ``function``, called with what ``prepare`` returns, whose time is not counted."""
        spent = self.once(function, prepare)
        while spent < self.warm_up:
            spent += self.once(function, prepare)
        return statistics.median(self.once(function, prepare) for _ in range(self.repeats))

    def once(self, function: Callable[..., object], prepare: Callable[[], object] | None = None) -> float:
        arguments = () if prepare is None else (prepare(),)
        synchronize(self.device)
        start = time.perf_counter()
        function(*arguments)
        synchronize(self.device)
        return time.perf_counter() - start


class EventTimer(Timer):
    """Median seconds of the GPU's work by CUDA events, without launch overhead; wall-clock time on a CPU.

    Stops before ``repeats`` runs when ``limit`` seconds have passed, but not before three runs.
    """

    def __init__(self, device: torch.device, repeats: int, limit: float = 1.0) -> None:
        super().__init__(device, repeats)
        self.limit = limit

    def median(self, function: Callable[..., object], prepare: Callable[[], object] | None = None) -> float:
        self.once(function, prepare)  # loads, compiles and fills the allocator
        seconds, end = [], time.perf_counter() + self.limit
        while len(seconds) < 3 or (len(seconds) < self.repeats and time.perf_counter() < end):
            seconds.append(self.once(function, prepare))
        return statistics.median(seconds)

    def once(self, function: Callable[..., object], prepare: Callable[[], object] | None = None) -> float:
        if self.device.type == 'cpu':
            return super().once(function, prepare)
        arguments = () if prepare is None else (prepare(),)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # cycles, about half a millisecond, in which the host queues the launches
        before.record()
        function(*arguments)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

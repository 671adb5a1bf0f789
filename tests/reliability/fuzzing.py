"""How the tests of bad input draw their cases: the same ones in each run, more of them in the long form."""

import signal
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

SECONDS = 60  # that a case may take on a busy machine; longer is a hang


def fuzz(name: str, strategy: SearchStrategy, cases: int, check: Callable[[object], object]) -> None:
    """Call ``check`` with drawn cases; it returns how a case ended, which is counted and printed."""
    ends: dict[str, int] = {}

    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(case):
        signal.alarm(SECONDS)
        try:
            end = str(check(case))
        finally:
            signal.alarm(0)
        ends[end] = ends.get(end, 0) + 1

    previous = signal.signal(signal.SIGALRM, _hang)
    try:
        run()
    finally:
        signal.signal(signal.SIGALRM, previous)
    print(f'{name}: {sum(ends.values())} cases: {", ".join(f"{number} {end}" for end, number in sorted(ends.items()))}')


def _hang(signum: int, frame: object) -> None:
    raise TimeoutError(f'a case took longer than {SECONDS} s')


def one_sentence(error: BaseException) -> str:
    """The kind of the error, whose message must be one line that says something."""
    message = str(error)
    assert message.strip() and '\n' not in message.strip(), message
    return type(error).__name__

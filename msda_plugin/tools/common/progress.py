"""A progress bar for commands that work through many files."""

import sys
from collections.abc import Callable


def progress(total: int, title: str = '') -> Callable[[], object]:
    """A function to call after each of ``total`` steps; it draws nothing unless standard error is a terminal."""
    if not sys.stderr.isatty():
        return lambda: None
    from mmengine.utils import ProgressBar  # imported here, because it takes a second

    if title:
        print(title, file=sys.stderr)
    bar = ProgressBar(total, file=sys.stderr)

    def tick() -> None:
        bar.update()
        if bar.completed == total:
            print(file=sys.stderr)

    return tick

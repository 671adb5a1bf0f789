"""The progress bar draws only on a terminal and ends its line."""

import io
import sys

import pytest

from msda_plugin.tools.common.progress import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize('terminal', [False, True])
def test_draws_only_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', stream := Stream(terminal))
    tick = progress(2, 'Reading:')
    for _ in range(2):
        tick()
    if terminal:
        assert stream.getvalue().startswith('Reading:\n') and '2/2' in stream.getvalue()
        assert stream.getvalue().endswith('\n')
    else:
        assert stream.getvalue() == ''

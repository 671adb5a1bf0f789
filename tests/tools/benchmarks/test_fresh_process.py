"""What a fresh process returns, raises, and leaves when it dies."""

import signal

import pytest

from msda_plugin.tools.benchmarks.fresh_process import in_a_process, peak_bytes


def test_returns_the_result_and_keeps_the_handler_of_ctrl_c():
    handler = signal.getsignal(signal.SIGINT)
    assert in_a_process(signal.getsignal, signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == handler


def test_what_it_raises_is_raised():
    with pytest.raises(RuntimeError, match="^ValueError: invalid literal for int.*'x'"):
        in_a_process(int, 'x')


def test_a_killed_process_is_not_waited_for():
    with pytest.raises(RuntimeError, match='ended with status -9: it was killed, for its memory perhaps'):
        in_a_process(signal.raise_signal, signal.SIGKILL)


def test_peak():
    assert peak_bytes() > 1e7

"""Results and errors of a function in a fresh process."""

import signal

import pytest

from msda_plugin.tools.benchmarks.fresh_process import in_a_process, peak_bytes, status_bytes


def test_returns_result_and_restores_sigint_handler():
    handler = signal.getsignal(signal.SIGINT)
    assert in_a_process(signal.getsignal, signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == handler


def test_raises_error_of_function():
    with pytest.raises(RuntimeError, match="^ValueError: invalid literal for int.*'x'"):
        in_a_process(int, 'x')


def test_killed_process():
    with pytest.raises(RuntimeError, match='ended with status -9: it was killed, perhaps because memory ran out'):
        in_a_process(signal.raise_signal, signal.SIGKILL)


def test_peak_is_at_least_resident_memory():
    assert peak_bytes() >= 0.99 * status_bytes('VmRSS') > 1e7

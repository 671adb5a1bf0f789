"""The timer of the benchmarks: order of the calls, warm-up, and the time that counts."""

import time

import pytest
import torch

from msda_plugin.tools.benchmarks.timing import EventTimer, Timer

CPU = torch.device('cpu')


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves by ``clock.append(seconds)``."""
    spent = []
    monkeypatch.setattr(time, 'perf_counter', lambda: sum(spent))
    return spent


def test_functions_run_one_after_another():
    calls = []
    seconds = Timer(CPU, 3)(lambda: calls.append('a'), lambda: calls.append('b'))
    assert ''.join(calls) == 'aaaabbbb' and len(seconds) == 2


def test_functions_alternate():
    calls = []
    seconds = Timer(CPU, 3).in_turn(lambda: calls.append('a'), lambda: calls.append('b'))
    assert ''.join(calls) == 'abababab' and len(seconds) == 2


@pytest.mark.parametrize('timer', [Timer(CPU, 3), EventTimer(CPU, 3, limit=100.0)])
def test_median_without_warm_up_and_preparation(timer, clock):
    durations = iter([9.0, 1.0, 5.0, 2.0])
    prepared = []

    def prepare():
        clock.append(10.0)
        return prepared.append(None)

    assert timer.median(lambda _: clock.append(next(durations)), prepare) == 2.0
    assert len(prepared) == 4


def test_warm_up_lasts_as_long_as_asked_for(clock):
    durations = iter([0.5, 0.5, 0.5, 7.0, 7.0])
    assert Timer(CPU, 2, warm_up=1.5).median(lambda: clock.append(next(durations))) == 7.0


def test_event_timer_stops_at_its_limit_after_three_runs(clock):
    calls = []

    def call():
        calls.append(None)
        clock.append(1.0)

    assert EventTimer(CPU, 30, limit=2.0).median(call) == 1.0
    assert len(calls) == 1 + 3

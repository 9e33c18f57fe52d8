"""Seconds by phase, also of phases that only stand in a GPU's queue."""

import pytest
import torch

from oprd.observability import timer
from oprd.observability.timer import PhaseTimer


class Event:
    """Of a GPU that needs two seconds to reach each of the events in its queue."""

    recorded = waited = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.milliseconds = 2000 * Event.recorded

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, end):
        return end.milliseconds - self.milliseconds


def test_queued_phases_are_timed_without_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    of_gpu = PhaseTimer(torch.device("cuda", 0))
    for _ in range(2):
        with of_gpu("teacher", queued=True):
            pass
        with of_gpu("student update", queued=True):
            pass
    assert (waits, Event.waited) == ([], 0)
    with of_gpu("student update"):
        pass
    assert len(waits) == 2
    found = of_gpu.take_step()
    assert found["teacher"] == pytest.approx(4)
    assert found["student update"] == pytest.approx(4, abs=0.1)
    assert of_gpu.total == pytest.approx(found)
    assert of_gpu.take_step() == {}


def test_on_a_cpu_a_queued_phase_is_timed_as_any(monkeypatch):
    seconds = iter([1.0, 4.0])
    monkeypatch.setattr(timer.time, "perf_counter", lambda: next(seconds))
    of_cpu = PhaseTimer(torch.device("cpu"))
    with of_cpu("teacher", queued=True):
        pass
    assert of_cpu.take_step() == {"teacher": 3.0}

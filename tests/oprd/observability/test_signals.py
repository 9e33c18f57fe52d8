"""Signals, as terminals, schedulers and torchrun send them."""

import signal

import pytest

from oprd.observability import signals
from oprd.observability.signals import Interrupt

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("signum", [INT, TERM])
def test_one_rank_ends_at_once_but_not_while_weights_change(signum):
    asked = Interrupt()
    reached = []
    with asked.armed():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
        assert (asked.signum, asked.aborted) == (signum, False)
    asked = Interrupt()
    with asked.armed(), pytest.raises(KeyboardInterrupt), asked.deferred():  # noqa: PT012
        signal.raise_signal(signum)
        reached.append("the end of the update")
    assert reached == ["the end of the update"]


@pytest.mark.parametrize("signum", [INT, TERM])
def test_of_several_ranks_none_ends_by_itself(signum):
    asked = Interrupt(at_once=False)
    with asked.armed(), asked.deferred():
        signal.raise_signal(signum)
    assert asked.signum == signum


def test_a_second_ctrl_c_is_not_held_back(monkeypatch):
    asked = Interrupt(at_once=False)
    with asked.armed():
        signal.raise_signal(INT)
        signal.raise_signal(INT)  # torchrun passes on what the terminal has sent already
        assert not asked.aborted
        monkeypatch.setattr(signals, "SAME_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(INT)
    assert asked.aborted


def test_a_scheduler_may_repeat_itself(monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST", -1.0)
    asked = Interrupt(at_once=False)
    with asked.armed():
        for _ in range(3):
            signal.raise_signal(TERM)
    assert (asked.signum, asked.aborted) == (TERM, False)


def test_what_handled_signals_before_does_again():
    before = [signal.getsignal(s) for s in (INT, TERM)]
    with Interrupt().armed():
        assert [signal.getsignal(s) for s in (INT, TERM)] != before
    assert [signal.getsignal(s) for s in (INT, TERM)] == before

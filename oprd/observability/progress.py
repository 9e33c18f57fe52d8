"""What the program is doing now: the phase, how far it has come, and where that is shown.

Code that takes long says so, wherever it runs and whether or not somebody looks::

    with work("evaluation of the teacher", total=2000, unit="responses"):
        advance(64)

`oprd.observability.run_log` shows `describe` in a terminal's live view. In a log, `Heartbeat`
writes a line while something takes long, and nothing for what is quick.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

FIRST_SECONDS, SECONDS = 10.0, 60.0
"""Seconds after which a log says what is going on, for the first time and then again."""


@dataclass
class Work:
    """Something that takes long.

    Attributes:
        what: its name.
        total: how many units there are; None: unknown.
        unit: what is counted.
        done: units that are done.
        detail: how far the unit that is being worked on has come; empty: unknown.
        started: the time of `time.monotonic` at its start.
    """

    what: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    detail: str = ""
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        parts = [self.what]
        if self.total is not None:
            parts.append(f"{min(self.done, self.total):,} of {self.total:,} {self.unit}".rstrip())
        return ", ".join([*parts, self.detail] if self.detail else parts)

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started


_works: list[Work] = []
"""The works that are open, the outermost first. Only the main thread changes it."""


@contextmanager
def work(what: str, total: int | None = None, unit: str = "") -> Iterator[None]:
    """Open a work, inside the works that are open already."""
    _works.append(Work(what, total, unit))
    try:
        yield
    finally:
        _works.pop()


def expect(total: int, unit: str) -> None:
    """Set how many units the innermost work has, and that none of them is done."""
    if _works:
        _works[-1].total, _works[-1].unit, _works[-1].done, _works[-1].detail = total, unit, 0, ""


def advance(units: int = 1) -> None:
    """Add units to those that the innermost work has done."""
    if _works:
        _works[-1].done += units
        _works[-1].detail = ""


def reach(done: int) -> None:
    """Set how many units the innermost work has done."""
    if _works:
        _works[-1].done = done


def detail(text: str) -> None:
    """Say how far the innermost work's present unit has come."""
    if _works:
        _works[-1].detail = text


def outermost() -> Work | None:
    """Return the outermost open work."""
    return next(iter(_works[:1]), None)


def describe() -> str:
    """Return the open works on one line, or "" if there are none."""
    return ": ".join(map(str, _works[:]))


def duration(seconds: float) -> str:
    """Format a duration: ``42s``, ``3m05s``, ``2h07m``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Heartbeat:
    """A thread that logs what is going on while a work takes long.

    The first line comes ``first`` seconds after the outermost work's start, the next ones every
    ``every`` seconds.
    """

    def __init__(self, first: float = FIRST_SECONDS, every: float = SECONDS) -> None:
        self.first, self.every = first, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")
        self._thread.start()

    def _run(self) -> None:
        seen: Work | None = None
        due = self.first
        while not self._stop.wait(min(self.first, 1.0) / 2):
            now = outermost()
            if now is None:
                continue
            if now is not seen:
                seen, due = now, self.first
            if now.seconds >= due:
                logger.info(f"{describe()} ({duration(now.seconds)} so far)")
                due = now.seconds + self.every

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

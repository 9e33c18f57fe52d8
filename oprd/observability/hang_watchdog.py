"""Hang watchdog: a thread on each rank that detects a hung run, reports the rank and ends the run.

    with hang_watchdog.watching(timeout_s, directory):
        hang_watchdog.beat(step=7)
        hang_watchdog.beat("rollout")  # now, and at every sign of progress

Each rank publishes its last beat in a store that all ranks can read. A rank that waits in a
collective does not beat, but the rank that it waits for may. The run therefore counts as hung only
if no rank has beaten for ``timeout_s``. Native code that holds the interpreter's lock, or a store
that can't be reached, blocks the thread too. Python's faulthandler, which needs neither, then ends
the process after ``2 * timeout_s``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from oprd import distributed

EXIT_CODE = 124
"""Exit code of a hung run, the same as that of the command `timeout`."""

_HUNG = "hung"
_STDERR = 2  # the descriptor, since faulthandler can't write to a replaced sys.stderr
_UNREACHABLE = (RuntimeError, OSError)
"""Errors that a store raises if its server is gone."""


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank.

    Attributes:
        rank, host: the rank and the name of its machine.
        step: the current step, counted from 1.
        phase: the current phase of the step.
        at: wall-clock time of the beat, in seconds.
        count: number of beats in this step so far.
        place: function, file and line that the main thread executes.
        waits: whether the main thread is in a call to torch.distributed.
    """

    rank: int
    host: str
    step: int = 0
    phase: str = "starting"
    at: float = 0.0
    count: int = 0
    place: str = ""
    waits: bool = False


class Heartbeat:
    """The beats of one rank, and the thread that watches them."""

    def __init__(
        self,
        timeout_s: float,
        directory: Path,
        rank: int = 0,
        ranks: int = 1,
        store: dist.Store | None = None,
    ) -> None:
        """
        Args:
            timeout_s: the run is ended after this many seconds without a beat of any rank.
            directory: parent of ``hung/``, which receives a message and the stacks of every rank.
            store: the store that all ranks share; None for a single rank.
        """
        self.timeout_s, self.directory, self.ranks, self.store = timeout_s, directory, ranks, store
        self.interval = min(max(timeout_s / 20, 0.05), 10.0)
        self.last = Beat(rank, socket.gethostname(), at=time.time())
        self._moved = time.monotonic()  # monotonic, since the wall clock may be adjusted
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="oprd-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and cancel the faulthandler."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Record a sign of progress, with ``phase`` and ``step`` if they have changed.

        Cheap, since the thread publishes the beat.
        """
        self._moved = time.monotonic()
        last = self.last
        self.last = replace(
            last,
            phase=last.phase if phase is None else phase,
            step=last.step if step is None else step,
            at=time.time(),
            count=last.count + 1 if step is None else 0,
        )

    def _watch(self) -> None:
        published = None
        while not self._stopped.wait(self.interval):
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=_STDERR)
            place, waits = _place_of_main_thread()
            last = replace(self.last, place=place, waits=waits)
            if last != published and self._tell(last):
                published = last
            if self._others_say_hung():
                self._dump_stacks()
                time.sleep(3 * self.interval)  # let the rank with the message end first
                os._exit(EXIT_CODE)
            if time.monotonic() - self._moved > self.timeout_s:
                beats = self._everyone(last)
                if time.time() - max(b.at for b in beats) > self.timeout_s:
                    self._end(beats)

    def _tell(self, last: Beat) -> bool:
        if self.store is None:
            return True
        with suppress(*_UNREACHABLE):
            self.store.set(str(last.rank), json.dumps(asdict(last)))
            return True
        return False  # the next turn tries again

    def _others_say_hung(self) -> bool:
        with suppress(*_UNREACHABLE):
            return self.store is not None and self.store.check([_HUNG])
        return False

    def _everyone(self, own: Beat) -> list[Beat]:
        """Return the last known beat of each rank."""
        beats = {own.rank: own}
        with suppress(*_UNREACHABLE):
            for key in map(str, range(self.ranks)):
                if self.store is not None and int(key) not in beats and self.store.check([key]):
                    beats[int(key)] = Beat(**json.loads(self.store.get(key)))
        return [beats[rank] for rank in sorted(beats)]

    def _end(self, beats: Sequence[Beat]) -> None:
        first = True
        with suppress(*_UNREACHABLE):
            first = self.store is None or self.store.add(_HUNG, 1) == 1
        self._dump_stacks()
        if first:
            text = describe(beats, self.ranks, time.time())
            text += (
                f". No rank has made progress for watchdog.timeout_s={self.timeout_s:g} s, so the "
                f"run ends with exit code {EXIT_CODE}. Stacks of all ranks: "
                f"{self.directory / 'hung'}. Resume from the last checkpoint; if a phase may take "
                "that long, raise watchdog.timeout_s"
            )
            sys.stderr.write(f"oprd-train: hung: {text}\n")
            sys.stderr.flush()
            with suppress(OSError):
                (self.directory / "hung" / "message.txt").write_text(text + "\n")
        time.sleep(2 * self.interval)  # leave the other ranks time to write their stacks
        os._exit(EXIT_CODE)

    def _dump_stacks(self) -> None:
        directory = self.directory / "hung"
        with suppress(OSError):  # the disk may be full or gone; the run ends anyway
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"rank_{self.last.rank}_stacks.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _place_of_main_thread() -> tuple[str, bool]:
    """Return the main thread's place, and whether that is in a call to torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "", False
    code = frame.f_code
    place = f"{code.co_name}, {Path(code.co_filename).name}:{frame.f_lineno}"
    files: list[str] = []
    while frame is not None and len(files) < 3:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return place, any(os.path.join("torch", "distributed") in file for file in files)


def describe(beats: Sequence[Beat], ranks: int, now: float) -> str:
    """Describe where each rank is, starting with the one that the others most likely wait for.

    That is the rank furthest behind among those that don't wait in a collective.

    Args:
        beats: the known beats.
        ranks: total number of ranks.
        now: wall-clock time in seconds.
    """
    behind = min(beats, key=lambda b: (b.waits, b.step, b.count, b.at))
    waiting = defaultdict(list)
    for beat in beats:
        if beat is not behind:
            waiting[beat.phase, beat.step, beat.place].append(beat.rank)
    text = (
        f"rank {behind.rank} ({behind.host}) has been in {behind.phase!r} of step "
        f"{behind.step} for {now - behind.at:,.0f} s (at {behind.place})"
    )
    parts = []
    for (phase, step, place), which in waiting.items():
        names = f"rank{'s' if len(which) > 1 else ''} {', '.join(map(str, which))}"
        verb = "wait" if len(which) > 1 else "waits"
        parts.append(f"{names} {verb} in {phase!r} of step {step} (at {place})")
    unknown = sorted(set(range(ranks)) - {b.rank for b in beats})
    if unknown:
        parts.append(f"nothing is known of rank(s) {', '.join(map(str, unknown))}")
    return text + (" while " + ", ".join(parts) if parts else "")


_current: Heartbeat | None = None


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Record a beat of this process. Does nothing outside `watching`."""
    if _current is not None:
        _current.beat(phase, step)


@contextmanager
def watching(timeout_s: float | None, directory: Path) -> Iterator[None]:
    """End the process with ``os._exit(124)`` if the run hangs inside the block.

    Does nothing if ``timeout_s`` is None.
    """
    global _current
    if timeout_s is None:
        yield
        return
    rank, ranks = distributed.rank(), distributed.world_size()
    heartbeat = Heartbeat(timeout_s, directory, rank, ranks, _store() if ranks > 1 else None)
    heartbeat.start()
    _current = heartbeat
    try:
        yield
    finally:
        _current = None
        heartbeat.stop()


def _store() -> dist.Store:
    """Open a separate connection to torchrun's store.

    The process group's connection is locked while it waits, for instance for a hung rank.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = dist.TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"oprd/heartbeat/{attempt}", server)

"""A rank that hangs: found by a thread beside each rank's work, which names it and ends the run.

    with heartbeat.watching(timeout_s, directory):
        heartbeat.beat(step=7)
        heartbeat.beat("rollout")  # now, and whenever something has moved

Each rank tells the others its last beat through a store that all of them reach. One that waits in a
collective does not beat, but the one that it waits for may: the run has come to a halt only when no
rank has beaten for ``timeout_s``. Native code that keeps the interpreter's lock, or a store beyond
a cut cable, holds this thread up too: after twice as long Python's faulthandler, which needs
neither, ends the process.
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
"""Of a run that has come to a halt; `timeout`'s."""

_HUNG = "hung"
_STDERR = 2  # its descriptor: faulthandler can't write to a stand-in for it
_UNREACHABLE = (RuntimeError, OSError)
"""What a store raises when its server is gone."""


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank.

    Attributes:
        rank, host: whose.
        step: that is being made, counted from 1.
        phase: what is being done.
        at: when, in seconds of the wall clock.
        count: beats in this step so far.
        place: where the work is now: function, file and line.
        waits: whether that is in a call to torch.distributed.
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
    """One rank's, and the thread that watches it."""

    def __init__(
        self, timeout_s: float, directory: Path, rank: int = 0, ranks: int = 1,
        store: dist.Store | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            timeout_s: without any rank's beat after which the run is ended.
            directory: receives ``hung/``: a message and the stacks of every rank.
            store: that all ranks share; None: this is the only one.
        """
        self.timeout_s, self.directory, self.ranks, self.store = timeout_s, directory, ranks, store
        self.interval = min(max(timeout_s / 20, 0.05), 10.0)
        self.last = Beat(rank, socket.gethostname(), at=time.time())
        self._moved = time.monotonic()  # the wall clock may be set
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="oprd-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Something has moved; ``phase`` and ``step`` if they have changed. Costs nothing: telling
        the others is the thread's work."""
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
        told = None
        while not self._stopped.wait(self.interval):
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True, file=_STDERR)
            place, waits = _place_of_main_thread()
            last = replace(self.last, place=place, waits=waits)
            if last != told and self._tell(last):
                told = last
            if self._others_say_hung():
                self._dump_stacks()
                time.sleep(3 * self.interval)  # the rank that found it ends first, with its message
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
        return False  # tried again at the next turn

    def _others_say_hung(self) -> bool:
        with suppress(*_UNREACHABLE):
            return self.store is not None and self.store.check([_HUNG])
        return False

    def _everyone(self, own: Beat) -> list[Beat]:
        """Each rank's last beat, as far as it is known."""
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
                f". No rank has moved for watchdog.timeout_s={self.timeout_s:g} s: the run ends "
                f"(exit code {EXIT_CODE}). Stacks of all ranks: {self.directory / 'hung'}. Resume "
                "from the last checkpoint; if a phase may take that long, raise the limit"
            )
            sys.stderr.write(f"oprd-train: hung: {text}\n")
            sys.stderr.flush()
            with suppress(OSError):
                (self.directory / "hung" / "message.txt").write_text(text + "\n")
        time.sleep(2 * self.interval)  # for the others to write their stacks
        os._exit(EXIT_CODE)

    def _dump_stacks(self) -> None:
        directory = self.directory / "hung"
        with suppress(OSError):  # of a disk that is full or gone; the run is to end all the same
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"rank_{self.last.rank}_stacks.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _place_of_main_thread() -> tuple[str, bool]:
    """Function, file and line; and whether that is in a call to torch.distributed."""
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
    """Who is where, beginning with the rank that the others most likely wait for: one that waits in
    no collective, and of these the one that is furthest behind.

    Args:
        beats: of the ranks that are known.
        ranks: how many there are.
        now: seconds of the wall clock.
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
    """This process's; nothing where none is watched."""
    if _current is not None:
        _current.beat(phase, step)


@contextmanager
def watching(timeout_s: float | None, directory: Path) -> Iterator[None]:
    """While open, a run that comes to a halt is ended (``os._exit(124)``); None: it is not."""
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
    """A connection of its own to torchrun's store: the process group's own is locked while it
    waits, for instance for a rank that hangs."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = dist.TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"oprd/heartbeat/{attempt}", server)

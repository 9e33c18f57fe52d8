"""Runs parts of a longer check, each a few commands with a time limit and a log of its own.

A part that fails or takes too long is ended and reported; the others run all the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


class PartFailed(Exception):
    """A command failed, or what it wrote won't do; the message is for the summary."""


class PartSkipped(Exception):
    """Something that the part needs is not here."""


class PartTimedOut(Exception):
    """A command was ended at the part's time limit; the message, if any, says what is there."""


@dataclass(frozen=True)
class Outcome:
    """Of a part. ``status``: ok, failed, timed out or skipped."""

    part: str
    status: str
    seconds: float
    note: str


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        name: its name.
        limit: seconds.
        log: receives what its commands print, after what is there.
        work: runs the commands by `Running.run` and returns a note for the summary.
    """

    name: str
    limit: float
    log: Path
    work: Callable[[Running], str]


class Running:
    """A part at work."""

    def __init__(self, part: Part, limit: float):
        self.log = part.log
        self.deadline = time.monotonic() + limit

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return max(self.deadline - time.monotonic(), 0.0)

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Run a command to its end and return what it printed.

        Raises:
            PartFailed: if its exit code is not 0.
            PartTimedOut: if it was ended, with every process it had started.
        """
        return self.run_all([command], env)

    def run_all(
        self, commands: Sequence[Sequence[str | Path]], env: Mapping[str, str] | None = None
    ) -> str:
        """The same of several at a time, into one log."""
        with self.log.open("ab") as log:
            start = log.seek(0, os.SEEK_END)
            started = []
            for command in commands:
                log.write(f"$ {' '.join(map(str, command))}\n".encode())
                log.flush()
                started.append(
                    subprocess.Popen(
                        [str(word) for word in command],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, **(env or {})},
                        start_new_session=True,
                    )
                )
            _started.update(started)
            try:
                for process in started:
                    process.wait(self.left)
            except subprocess.TimeoutExpired:
                log.write(b"\nended at its time limit\n")
                raise PartTimedOut from None
            finally:
                for process in started:
                    _end(process)
        printed = self.log.read_bytes()[start:].decode(errors="replace")
        if codes := [p.returncode for p in started if p.returncode]:
            last = next((x for x in reversed(printed.splitlines()) if x.strip()), "")
            raise PartFailed(f"exit code {codes[0]}: {last.strip()[:200]}")
        return printed


_started: set[subprocess.Popen] = set()


def end_all() -> NoReturn:
    """End this process and what it has started: for SIGTERM, which the commands, in sessions of
    their own, don't get."""
    for process in list(_started):
        _end(process)
    os._exit(128 + signal.SIGTERM)


def _end(process: subprocess.Popen) -> None:
    _started.discard(process)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: Part, left: float) -> Outcome:
    """Run one, for at most ``left`` seconds."""
    limit = min(part.limit, left)
    if limit < 1:
        return Outcome(part.name, "skipped", 0.0, "no time was left")
    start = time.monotonic()
    running = Running(part, limit)
    try:
        status, note = "ok", part.work(running)
    except PartSkipped as reason:
        status, note = "skipped", str(reason)
    except PartTimedOut as so_far:
        status, note = "timed out", f"ended after {limit:.0f} s"
        note += f": {so_far}" if str(so_far) else ""
    except Exception as error:
        status, note = "failed", f"{error}" or type(error).__name__
    return Outcome(part.name, status, time.monotonic() - start, note)


def run_stages(
    stages: Sequence[Sequence[Part]], budget: float, done: Callable[[Outcome], None]
) -> None:
    """Stage after stage, the parts of one at the same time, within ``budget`` seconds.

    Args:
        done: called with each part's outcome, in order.
    """
    end = time.monotonic() + budget
    for stage in stages:
        with ThreadPoolExecutor(max(len(stage), 1)) as pool:
            left = end - time.monotonic()
            for outcome in pool.map(lambda part, left=left: run_part(part, left), stage):
                done(outcome)

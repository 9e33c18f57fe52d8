"""Jobs side by side, each in a process of its own, with what they print in a file.

A server process imports the packages once, and each job's process is a fork of it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from oprd.observability.progress import duration
from oprd.observability.signals import Interrupted
from oprd.paper.one import LOG, Job, run

logger = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a job that a signal ended."""
TAIL = 15
"""Lines of a failed job's log that are shown."""
HEARTBEAT = 60.0
"""Seconds without news after which a line says what is running."""
PATIENCE = 60.0
"""Seconds in which a job writes its checkpoint after a signal."""


class JobsFailed(RuntimeError):
    """Some jobs failed; the others are done, or were not begun because they need a failed one."""


def run_jobs(jobs: Sequence[Job], at_once: int, threads: int) -> None:
    """Do the jobs that are not done, in their order, as far as what they need is done.

    A job that fails does not end the others.

    Args:
        at_once: number of jobs at a time.
        threads: number of threads of each.

    Raises:
        JobsFailed: at the end, if any failed.
        Interrupted: after a signal; the jobs that were running have written checkpoints.
    """
    waiting = [job for job in jobs if not job.done]
    if found := len(jobs) - len(waiting):
        logger.info(f"{found} of {len(jobs)} jobs are done already")
    if not waiting:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oprd.paper.one", "oprd.paper.after"])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the server, before it imports anything
    running: dict[BaseProcess, tuple[Job, float]] = {}
    failed: dict[str, str] = {}
    clock = _Clock(waiting, at_once)
    previous = signal.signal(signal.SIGTERM, _raise)
    try:
        while waiting or running:
            for job in _ready(waiting, running, failed)[: at_once - len(running)]:
                waiting.remove(job)
                process: BaseProcess = context.Process(
                    target=_child, args=(job, threads), name=job.title
                )
                process.start()
                running[process] = job, time.monotonic()
            if not running:
                break  # the rest needs what failed
            if not wait([process.sentinel for process in running], HEARTBEAT):
                logger.info(f"running: {_shown(running)}")
            for process in [p for p in running if p.exitcode is not None]:
                job, begun = running.pop(process)
                seconds = time.monotonic() - begun
                if process.exitcode or not job.done:
                    failed[job.title] = _tail(job)
                    logger.warning(f"{job.title} failed after {duration(seconds)}")
                else:
                    left = clock.left(job, seconds, [j for j, _ in running.values()] + waiting)
                    logger.info(f"{job.title}: {duration(seconds)}; about {duration(left)} left")
    except KeyboardInterrupt as error:
        _stop(running)
        raise Interrupted(getattr(error, "signum", signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    if failed:
        tails = "\n".join(f"--- {title}\n{tail}" for title, tail in failed.items())
        skipped = f"; not begun: {', '.join(j.title for j in waiting)}" if waiting else ""
        raise JobsFailed(f"failed: {', '.join(failed)}{skipped}\n{tails}")


def _raise(signum: int, _frame: object) -> None:
    raise Interrupted(signum)


def _ready(
    waiting: Sequence[Job], running: dict[BaseProcess, tuple[Job, float]], failed: dict[str, str]
) -> list[Job]:
    """Return the jobs that could begin now."""
    open_jobs = {j.title for j in waiting} | {j.title for j, _ in running.values()} | set(failed)
    return [job for job in waiting if not open_jobs.intersection(job.needs)]


def _shown(running: dict[BaseProcess, tuple[Job, float]]) -> str:
    now = time.monotonic()
    return "; ".join(
        f"{job.title} for {duration(now - begun)} ({log_file(job)})"
        for job, begun in running.values()
    )


def _stop(running: dict[BaseProcess, tuple[Job, float]]) -> None:
    """End the jobs, with time for their checkpoints."""
    for process in running:
        process.terminate()
    if running:
        logger.info("waiting for the runs' checkpoints (the making of a teacher has none)")
    end = time.monotonic() + PATIENCE
    for process in running:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()


def _child(job: Job, threads: int) -> None:
    """Do a job, in its process: apart from the terminal's signals, with its output in a file."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    log = log_file(job)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    from oprd.observability.console import shown

    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # set already
        torch.set_num_interop_threads(1)
    try:
        with shown():
            run(job)
    except KeyboardInterrupt:
        os._exit(STOPPED)


def log_file(job: Job) -> str:
    """Return the path of a job's log, beside its directory, which belongs to the run."""
    return f"{job.directory}.{LOG}"


def _end_with_parent() -> None:
    """Wait for the end of ``oprd-paper`` itself, and then end this job as a signal would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _tail(job: Job) -> str:
    try:
        with open(log_file(job), errors="replace") as log:
            return "".join(log.readlines()[-TAIL:]).rstrip() + f"\n({log_file(job)})"
    except OSError as error:
        return f"no log: {error}"


class _Clock:
    """Estimates how long the rest takes, from what the jobs so far took."""

    def __init__(self, jobs: Sequence[Job], at_once: int) -> None:
        self.at_once = min(at_once, len(jobs))
        self.weight = self.seconds = 0.0

    def left(self, job: Job, seconds: float, rest: Sequence[Job]) -> float:
        """Return the seconds that the ``rest`` takes, now that ``job`` is done."""
        self.weight += job.weight
        self.seconds += seconds
        return sum(j.weight for j in rest) * self.seconds / self.weight / self.at_once

"""Grading in other processes, so that a response that hangs or crashes a grader costs only itself.

A grader's process is ended after a time limit, and started again for the next response.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from oprd.data import reasoning_gym
from oprd.distributed.device import num_cores
from oprd.evaluation.grading import exact, last_boxed, quick_verdict
from oprd.observability import hang_watchdog

logger = logging.getLogger(__name__)

WORKER = "oprd.evaluation.grade_worker"
SECONDS = 10.0
START_SECONDS = 600.0
MAX_WORKERS = 8
QUICK = 1000
"""Characters of the longest answer that this process looks at itself."""


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    Attributes:
        score: 1 if the response is right, else 0; a task of reasoning-gym may give a part.
        boxed: whether there is a complete box; None if the grader needs none.
        failed: why the grader gave no verdict ("time limit", "crash"); the response then counts as
            wrong.
    """

    score: float
    boxed: bool | None = None
    failed: str | None = None

    @property
    def right(self) -> bool:
        """Whether the response counts as right."""
        return self.score >= 1


def grade_all(
    grader: str, responses: Sequence[str], answers: Sequence[str], seconds: float = SECONDS
) -> list[Grade]:
    """Grade responses, each against the answer at its place.

    Answers of reasoning-gym are graded by the scorer of their task, whatever ``grader`` is.

    Args:
        grader: ``exact`` or ``math``, see `oprd.evaluation.grading`.
        seconds: time limit of one response, of the processor's time.

    Raises:
        RuntimeError: if the graders' processes do not start.
    """
    grades: list[Grade | None] = [None] * len(responses)
    requests: list[tuple[int, str, bool | None]] = []
    for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
        if reasoning_gym.is_task(answer):
            text = reasoning_gym.final_answer(response)
            requests.append((i, json.dumps(["reasoning_gym", text, answer]), None))
        elif grader == "exact":
            grades[i] = Grade(float(exact(response, answer)))
        elif (boxed := last_boxed(response)) is None:
            grades[i] = Grade(0.0, boxed=False)
        else:
            verdict = quick_verdict(boxed, answer) if len(boxed) <= QUICK else None
            if verdict is not None:
                grades[i] = Grade(float(verdict), boxed=True)
            else:
                requests.append((i, json.dumps(["math", boxed, answer]), True))
    known: dict[str, list[int]] = {}  # equal requests are asked once
    for i, request, _ in requests:
        known.setdefault(request, []).append(i)
    boxes = {i: boxed for i, _, boxed in requests}
    for request, (score, failed) in zip(known, _ask_all(list(known), seconds), strict=True):
        for i in known[request]:
            grades[i] = Grade(score, boxes[i], failed)
    return [grade for grade in grades if grade is not None]


def _ask_all(requests: Sequence[str], seconds: float) -> list[tuple[float, str | None]]:
    """Return the score of each request, and why a grader failed."""
    results: list[tuple[float, str | None]] = [(0.0, None)] * len(requests)
    waiting: SimpleQueue[int] = SimpleQueue()
    for i in range(len(requests)):
        waiting.put(i)

    def work() -> None:
        with _Worker(seconds) as worker:
            while True:
                try:
                    i = waiting.get_nowait()
                except Empty:
                    return
                results[i] = worker.ask(requests[i])
                hang_watchdog.beat()

    count = _workers(len(requests))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    if failed := [why for _, why in results if why is not None]:
        counts = ", ".join(f"{failed.count(why)} by {why}" for why in sorted(set(failed)))
        logger.warning(
            f"the grader gave no verdict on {len(failed)} responses ({counts}): they count as wrong"
        )
    return results


def _workers(requests: int) -> int:
    """Return the number of processes: no more than this rank's share of the cores."""
    share = num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share, 1), MAX_WORKERS, -(-requests // 8))


class _Worker:
    """A grader's process, started when it is first needed, and again after it has ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, request: str) -> tuple[float, str | None]:
        """Return the score of a request, or 0 and why there is none."""
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # it died between two requests
            self._end()
            self._start()
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
        # The process ends itself at the limit. The rest is for one that can't, stopped or swapped.
        answer = self._line(10 * self.seconds + START_SECONDS)
        if answer:
            return float(answer), None
        code = self._end(patience=0.0 if answer is None else 60.0)
        if code in (None, -signal.SIGALRM, -signal.SIGPROF):
            return 0.0, "the time limit"
        return 0.0, f"a crash (exit code {code})"

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        # One hash seed: a few tasks of reasoning-gym go through sets.
        environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(self.seconds)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._line(START_SECONDS) != "ready":
            code = self._end(patience=10.0)
            raise RuntimeError(
                f"the grader's process did not start (exit code {code}): run python -m {WORKER} "
                f"{self.seconds:g} to see why"
            )

    def _line(self, seconds: float) -> str | None:
        """Return the next line of the process, "" if it ends, None if it takes too long."""
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return self.process.stdout.readline().decode().strip()

    def _end(self, patience: float = 0.0) -> int | None:
        """End the process; return its exit code, None if it had to be killed.

        Args:
            patience: seconds to wait for a process that is about to end by itself.
        """
        if self.process is None:
            return None
        process, self.process = self.process, None
        code = process.poll()
        if code is None:
            try:
                code = process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        return code

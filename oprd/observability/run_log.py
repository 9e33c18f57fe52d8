"""A run's output on rank 0: metrics file, progress display and closing tables."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from oprd.config import LoggingConfig
from oprd.observability.console import console
from oprd.observability.summary import EvalResult, Summary
from oprd.observability.trackers import Trackers

logger = logging.getLogger(__name__)

DEMO_ORIGIN = "Student and teacher of the demo are two checkpoints of one training run."


class RunLog:
    """Writer of ``metrics.jsonl`` and of progress: live on a terminal, plain lines elsewhere."""

    def __init__(self, directory: Path, steps: int, log_every: int, enabled: bool) -> None:
        self.enabled, self.steps, self.log_every = enabled, steps, log_every
        self.console = console if enabled else Console(quiet=True)
        self.started, self.first = time.perf_counter(), 0
        self._failed = False
        self.directory = directory
        self._file = None
        self._trackers: Trackers | None = None
        self._progress: Progress | None = None
        if enabled:
            self._file = (directory / "metrics.jsonl").open("ab")

    def report_to(self, cfg: LoggingConfig, config: Mapping[str, Any], step: int) -> None:
        """Send all further records to trackers too.

        Args:
            config: the run's configuration, as plain values.
            step: number of steps already made; above 0 in a resumed run.
        """
        if self.enabled:
            self._trackers = Trackers(cfg, self.directory, config, step)

    def start(self, step: int = 0) -> None:
        """Start the progress display and the clock after ``step`` steps."""
        self.started, self.first = time.perf_counter(), step
        if self.enabled and self.console.is_terminal:
            self._progress = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._task = self._progress.add_task("train", total=self.steps, completed=step, line="")
            self._progress.start()

    def record(self, metrics: dict) -> None:
        """Append one line to the metrics file and send it to the trackers.

        If the disk is full, the line waits in memory.
        """
        if self._file:
            self._write(json.dumps(metrics) + "\n")
        if self._trackers:
            self._trackers.log(metrics)

    def _write(self, text: str) -> None:
        assert self._file is not None
        try:
            self._file.write(text.encode())
            self._file.flush()  # after an error the text stays in the buffer for the next try
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning(f"{self._file.name} can't be written now: {error}")
            self._failed = True

    def position(self) -> int:
        """Flush the metrics file to the disk and return its size in bytes."""
        if not self._file:
            return 0
        self._write("")
        if not self._failed:
            os.fsync(self._file.fileno())
        return self._file.tell()

    def step(self, step: int, metrics: dict) -> None:
        """Record a training step and show it."""
        self.record({"step": step, **metrics})
        line = step_line(metrics)
        if self._progress:
            self._progress.update(self._task, completed=step, line=line)
        elif step % self.log_every == 0 or step in (1, self.steps):
            spent = time.perf_counter() - self.started
            eta = spent / (step - self.first) * (self.steps - step)
            logger.info(f"step {step}/{self.steps}  {line}  eta {eta:.0f}s")

    def evaluation(self, step: int, who: str, results: dict[str, EvalResult]) -> None:
        """Record an evaluation and show it."""
        metrics: dict[str, float] = {}
        for name, result in results.items():
            metrics |= result.metrics(name)
        self.record({"step": step, "model": who, **metrics})
        shown = "  ".join(f"{name} {r.avg:.3f} (len {r.length:.1f})" for name, r in results.items())
        logger.info(f"eval at step {step}, {who}: {shown}")

    def closing(self, summary: Summary, teachers: list[str]) -> None:
        """Show the closing tables and where the results are.

        Args:
            teachers: paths of the teachers.
        """
        origin = DEMO_ORIGIN if teachers == ["demo:teacher"] else None
        tables = closing_tables(summary.evaluations, summary.phases, summary.delta_peak_gb, origin)
        for table in tables:
            self.console.print(table)
        state = f"finished; student: {summary.student}"
        if summary.interrupted:
            state = f"interrupted after step {summary.steps}; --resume auto goes on from "
            state += str(summary.student)
        logger.info(f"{state}  metrics: {self.directory}/metrics.jsonl")

    def close_progress(self) -> None:
        """Remove the live display from the terminal."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Stop the display, and close the trackers and the file."""
        self.close_progress()
        if self._trackers:
            self._trackers.close()
            self._trackers = None
        if self._file:
            self._write("")
            with contextlib.suppress(OSError):  # _write has reported it
                self._file.close()
            self._file = None


def step_line(metrics: dict) -> str:
    """Format the metrics of a step as one line."""
    losses = {n: x for n, x in metrics.items() if n.startswith("actor/") and n.endswith("_loss")}
    names = ["loss"] if len(losses) == 1 else [n[len("actor/") : -len("_loss")] for n in losses]
    parts = [f"{n} {x:.4g}" for n, x in zip(names, losses.values(), strict=True)]
    if "rep/cosine_similarity" in metrics:
        parts.append(f"cos {metrics['rep/cosine_similarity']:.4f}")
    parts += [
        f"len {metrics['response_length/mean']:.1f}",
        f"{metrics['perf/tokens_per_second']:.0f} tok/s",
    ]
    peak = metrics.get("mem/actor_update_peak_alloc_GB")
    if peak is not None:
        parts.append(f"peak {peak:.2f} GiB")
    return "  ".join(parts)


def closing_tables(
    evaluations: dict[str, dict[str, EvalResult]],
    phases: dict[str, float],
    delta_peak: float | None,
    origin: str | None = None,
) -> list[Table]:
    """Make tables of the models' accuracy and of the seconds by phase.

    Args:
        evaluations: results by model ("teacher", "student before", "student after"), then by set.
        phases: seconds by phase.
        delta_peak: peak memory of the student's update in GiB, None if not measured.
        origin: caption that says where the models come from.
    """
    tables = []
    if evaluations:
        accuracy = Table(title="accuracy", caption=origin)
        accuracy.add_column("model")
        names = list(next(iter(evaluations.values())))
        k = next(iter(next(iter(evaluations.values())).values())).samples if names else 1
        for name in names:
            accuracy.add_column(f"{name} avg@{k}", justify="right")
            accuracy.add_column("len", justify="right")
        for who, results in evaluations.items():
            cells = [f(results[n]) for n in names for f in (_accuracy_cell, _length_cell)]
            accuracy.add_row(who, *cells)
        tables.append(accuracy)
    seconds = Table(title="wall-clock")
    seconds.add_column("phase")
    seconds.add_column("seconds", justify="right")
    seconds.add_column("share", justify="right")
    total = sum(phases.values())
    for phase, value in phases.items():
        seconds.add_row(phase, f"{value:.1f}", f"{value / total:.0%}" if total else "-")
    if delta_peak is not None:
        seconds.caption = f"student update, delta-peak memory: {delta_peak * 1024:.1f} MiB"
    tables.append(seconds)
    return tables


def _accuracy_cell(result: EvalResult) -> str:
    return f"{result.avg:.4f}"


def _length_cell(result: EvalResult) -> str:
    return f"{result.length:.1f}"

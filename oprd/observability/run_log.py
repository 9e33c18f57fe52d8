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

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from oprd.config import LoggingConfig
from oprd.observability import progress
from oprd.observability.console import console
from oprd.observability.summary import EvalResult, Summary
from oprd.observability.tables import TextTable, show
from oprd.observability.trackers import Trackers

logger = logging.getLogger(__name__)

DEMO_ORIGIN = "Student and teacher of the demo are two checkpoints of one training run."

LOG_WIDTH = 80
"""Characters of a line in a log that is not a terminal."""
CUT_SHOWN = 0.05
"""Share of responses cut at ``max_new_tokens`` from which on the step's line says so."""


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
        self._live: Live | None = None
        self._heartbeat: progress.Heartbeat | None = None
        self._made: int | None = None  # the number of steps made; None: not yet training
        self._line = ""
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

    def show(self) -> None:
        """Show what the run is doing from here on: live at a terminal, else in a line now and then.

        The display ends with `close_progress`.
        """
        if not self.enabled:
            return
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._view,
                console=self.console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        else:
            self._heartbeat = progress.Heartbeat()

    def start(self, step: int = 0) -> None:
        """Start the bar and the clock after ``step`` steps."""
        self.started, self.first, self._made = time.perf_counter(), step, step

    def _view(self) -> Group:
        """Make the live view: the bar, the last step's numbers, and what is going on."""
        lines: list[Table | Text] = []
        if self._made is not None:
            bar = Table.grid(padding=(0, 1))
            done = ProgressBar(total=self.steps, completed=self._made, width=30)
            bar.add_row(f"step {self._made}/{self.steps}", done, self._eta(self._made))
            lines += [bar, Text(self._line, overflow="ellipsis", no_wrap=True)]
        now = progress.outermost()
        doing = "" if now is None else f"{progress.describe()}  {progress.duration(now.seconds)}"
        lines.append(Text(doing, style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*lines)

    def _eta(self, step: int) -> str:
        if step == self.first:
            return ""
        spent = time.perf_counter() - self.started
        left = spent / (step - self.first) * (self.steps - step)
        return f"eta {progress.duration(left)}"

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
        self._made = step
        if self._live:
            self._line = step_line(metrics, self.console.width)
        elif self.enabled and (step % self.log_every == 0 or step in (1, self.steps)):
            begin, end = f"step {step}/{self.steps}", self._eta(step)
            room = LOG_WIDTH - len(begin) - len(end) - 4
            logger.info(f"{begin}  {step_line(metrics, room)}  {end}")

    def evaluation(self, step: int, who: str, results: dict[str, EvalResult]) -> None:
        """Record an evaluation and show it."""
        metrics: dict[str, float] = {}
        for name, result in results.items():
            metrics |= result.metrics(name)
        self.record({"step": step, "model": who, **metrics})
        shown = [f"{name} {r.avg:.3f} (len {r.length:.1f})" for name, r in results.items()]
        line = f"eval at step {step}, {who}: {'  '.join(shown)}"
        if len(line) > LOG_WIDTH:  # a line for each set
            line = "\n  ".join([f"eval at step {step}, {who}:", *shown])
        logger.info(line)

    def closing(self, summary: Summary, teachers: list[str]) -> None:
        """Show the closing tables and where the results are.

        Args:
            teachers: paths of the teachers.
        """
        self.close_progress()
        origin = DEMO_ORIGIN if teachers == ["demo:teacher"] else None
        tables = closing_tables(summary.evaluations, summary.phases, summary.delta_peak_gb, origin)
        self.console.print()
        show(self.console, tables)
        state = f"finished; student: {summary.student}"
        if summary.interrupted:
            state = f"interrupted after step {summary.steps}; --resume auto goes on from "
            state += str(summary.student)
        logger.info(f"{state}  metrics: {self.directory}/metrics.jsonl")

    def close_progress(self) -> None:
        """End the display; at a terminal, remove it."""
        if self._live:
            self._live.stop()
            self._live = None
        if self._heartbeat:
            self._heartbeat.close()
            self._heartbeat = None

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


def step_line(metrics: Mapping[str, Any], room: int = LOG_WIDTH) -> str:
    """Format the metrics of a step as one line, with as many as fit into ``room`` characters.

    These are the losses, the cosine of student and teacher, the mean response length in tokens,
    the share of responses that were cut, the share of tokens that a teacher with another tokenizer
    could be compared at, the speed, and the peak memory of the student's update.
    """
    losses = {n: x for n, x in metrics.items() if n.startswith("actor/") and n.endswith("_loss")}
    names = ["loss"] if len(losses) == 1 else [n[len("actor/") : -len("_loss")] for n in losses]
    parts = [f"{n} {x:.4g}" for n, x in zip(names, losses.values(), strict=True)]
    if "rep/cosine_similarity" in metrics:
        parts.append(f"cos {metrics['rep/cosine_similarity']:.4f}")
    parts.append(f"len {metrics['response_length/mean']:.1f}")
    if (cut := metrics.get("response_length/clip_ratio", 0.0)) >= CUT_SHOWN:
        parts.append(f"cut {cut:.0%}")
    if "align/ratio" in metrics:
        parts.append(f"aligned {metrics['align/ratio']:.0%}")
    parts.append(f"{metrics['perf/tokens_per_second']:.0f} tok/s")
    peak = metrics.get("mem/actor_update_peak_alloc_GB")
    if peak is not None:
        parts.append(f"peak {peak:.2f} GiB")
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


def closing_tables(
    evaluations: dict[str, dict[str, EvalResult]],
    phases: dict[str, float],
    delta_peak: float | None,
    origin: str | None = None,
) -> list[TextTable]:
    """Make tables of the models' accuracy and of the seconds by phase.

    Args:
        evaluations: results by model ("teacher", "student before", "student after"), then by set.
        phases: seconds by phase.
        delta_peak: peak memory of the student's update in GiB, None if not measured.
        origin: a note that says where the models come from.
    """
    tables = []
    sets = dict.fromkeys(name for results in evaluations.values() for name in results)
    found = [
        (name, who, results[name])
        for name in sets
        for who, results in evaluations.items()
        if name in results
    ]
    if found:
        k = found[0][2].samples
        rows = [
            [
                name,
                who,
                f"{r.avg:.4f}",
                *([f"{r.best:.4f}"] if k > 1 else []),
                f"{r.length:.1f}",
                f"{r.truncated:.1%}",
            ]
            for name, who, r in found
        ]
        best = [f"best@{k}"] if k > 1 else []
        heads = ["set", "model", f"avg@{k}", *best, "length\ntokens", "cut at the\nlimit"]
        notes = [origin] if origin else []
        tables.append(TextTable("accuracy", heads, rows, notes, left=(0, 1)))
    total = sum(phases.values())
    shares = [
        [phase, f"{value:.1f}", f"{value / total:.0%}" if total else "-"]
        for phase, value in phases.items()
    ]
    notes = []
    if delta_peak is not None:
        notes.append(f"student update, delta-peak memory: {delta_peak * 1024:.1f} MiB")
    tables.append(TextTable("wall-clock", ("phase", "seconds", "share"), shares, notes))
    return tables

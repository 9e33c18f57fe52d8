"""``oprd-train``'s own trainer, watched: what each of its steps takes, and on what.

`MeasuredTrainer` is `oprd.training.trainer.Trainer` with a finer timer. It changes nothing of a
step; it leaves out what surrounds the steps (files, closing tables).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from oprd.benchmark.step_flops import Lengths
from oprd.benchmark.step_idle import idle_share
from oprd.benchmark.step_memory import Timeline, recorded
from oprd.config import TrainConfig
from oprd.data.rollout import Rollout
from oprd.distill.objectives import StudentPass
from oprd.observability.memory import GIB
from oprd.observability.signals import Interrupted
from oprd.observability.summary import EvalResult, Summary
from oprd.observability.timer import PhaseTimer
from oprd.training.evaluator import AFTER, Subject
from oprd.training.inputs import RunInputs
from oprd.training.trainer import Trainer, TrainingStopped

ROLLOUT, TEACHER, FORWARD, BACKWARD, OPTIMIZER = (
    "rollout",
    "teacher",
    "forward",
    "backward",
    "optimizer",
)
SYNC, GAP, REST = "weight sync", "gap check", "rest"
PHASES = (ROLLOUT, TEACHER, FORWARD, BACKWARD, OPTIMIZER, SYNC, GAP, REST)
UPDATE = (FORWARD, BACKWARD, OPTIMIZER)
STUDENT_UPDATE = "student update"
PROFILED_TOKENS = 128
"""Longest responses of the step whose kernels a profiler records: it keeps each of them."""


@dataclass(frozen=True)
class Span:
    """A stretch of time, by `time.perf_counter`."""

    phase: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


class SpanTimer(PhaseTimer):
    """A `PhaseTimer` that also keeps each stretch of time, in ``spans``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.spans: list[Span] = []

    @contextmanager
    def __call__(self, phase: str, *, queued: bool = False) -> Iterator[None]:
        """See `PhaseTimer`. Every phase is waited for, queued or not: spans are of the clock."""
        with super().__call__(phase), self.span(phase):
            yield

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Keep the block's time, with the pending work of the GPU, as a span only."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self.spans.append(Span(phase, start, time.perf_counter()))

    def take_spans(self) -> list[Span]:
        """Return the spans since the last call, and forget them."""
        taken, self.spans = self.spans, []
        return taken


@dataclass(frozen=True)
class Step:
    """What one step took.

    Attributes:
        seconds: wall-clock seconds by phase (`PHASES`), which add up to the step's.
        inside: seconds of `Trainer._update`: the teacher, the update and their host work.
        cpu, cpu_inside: CPU seconds of the process, of all its threads, in the step and inside.
        delta_peak: bytes that the update added at its peak; None if not measurable.
        lengths: the rollouts' lengths.
        truncated: the number of rollouts that were cut.
    """

    seconds: dict[str, float]
    inside: float
    cpu: float
    cpu_inside: float
    delta_peak: int | None
    lengths: Lengths
    truncated: int

    @property
    def wall(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())

    @property
    def update(self) -> float:
        """Seconds of the student's update alone."""
        return sum(self.seconds[phase] for phase in UPDATE)


@dataclass
class Measured:
    """What the rounds measured of one objective.

    Attributes:
        own: each round's steps as trained.
        equal: each round's updates on the rollouts that all objectives share.
        idle: shares of the time without a kernel, in rollout and update; None: not known.
        timeline: memory over time of an update on the first of the shared rollouts.
        recomputed: the number of the student's blocks that recomputed their activations.
        accuracy: the evaluation of the student after the measured steps, by set.
    """

    own: list[list[Step]] = field(default_factory=list)
    equal: list[list[Step]] = field(default_factory=list)
    idle: tuple[float | None, float | None] = (None, None)
    timeline: Timeline | None = None
    recomputed: int = 0
    accuracy: dict[str, EvalResult] = field(default_factory=dict)


def by_phase(spans: Sequence[Span], wall: float) -> dict[str, float]:
    """Return the seconds of each of `PHASES`; the rest is what no span covers."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for phase, start, end in stretches(spans):
        seconds[phase] += end - start
    for span in spans:
        if span.phase in (ROLLOUT, SYNC, GAP):
            seconds[span.phase] += span.seconds
    seconds[REST] = wall - sum(seconds.values())
    return seconds


def stretches(spans: Sequence[Span]) -> list[tuple[str, float, float]]:
    """Return the phases of an update as (name, start, end), in order and without overlap.

    A span of the update that has a forward is a micro-batch's, and the rest of it is backward.
    Others sum gradients over ranks, clip them and make the optimizer's step.
    """
    made: list[tuple[str, float, float]] = []
    forwards = [span for span in spans if span.phase == FORWARD]
    for span in sorted(spans, key=lambda s: s.start):
        inside = [f for f in forwards if span.start <= f.start and f.end <= span.end]
        if span.phase == TEACHER:
            made.append((TEACHER, span.start, span.end))
        elif span.phase == STUDENT_UPDATE and inside:
            made.append((FORWARD, span.start, inside[-1].end))
            made.append((BACKWARD, inside[-1].end, span.end))
        elif span.phase == STUDENT_UPDATE:
            made.append((OPTIMIZER, span.start, span.end))
    return made


class MeasuredTrainer(Trainer):
    """A `Trainer` that measures its steps and saves nothing.

    Attributes:
        steps: what each step took, the warm-up's included.
        sampled: the rollouts of each step.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        inputs: RunInputs,
        steps: int,
        evaluates: bool = False,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """
        Args:
            cfg: the run. Its ``steps`` determine the schedule of the learning rate.
            steps: the number of steps to make.
            evaluates: evaluate the student after them.
            on_step: called with the number of steps made.
        """
        super().__init__(cfg, inputs)
        self.last, self.evaluates, self.on_step = steps, evaluates, on_step
        self.spans = SpanTimer(self.device)
        self.timer = self.spans
        self.log.console = Console(quiet=True, force_terminal=False)
        self.steps: list[Step] = []
        self.sampled: list[list[Rollout]] = []
        self._inside = (0.0, 0.0)
        self._metrics: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        """Start the clocks of a step."""
        self.spans.take_spans()
        self._started = (time.perf_counter(), time.process_time())

    def _load(self) -> None:
        super()._load()
        self.cfg.steps = self.last  # only now: the schedule is made from the run's own number
        objectives = self.update.objectives
        student_pass = objectives.student_pass

        def timed(*args: Any, **options: Any) -> StudentPass:
            with self.spans.span(FORWARD):
                return student_pass(*args, **options)

        setattr(objectives, "student_pass", timed)  # noqa: B010
        self._begin()

    def _rollouts(self) -> tuple[list[Rollout], dict[str, Any]]:
        rollouts, metrics = super()._rollouts()
        self.sampled.append(rollouts)
        return rollouts, metrics

    def _update(self, rollouts: list[Rollout]) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._metrics = super()._update(rollouts)
        self._inside = (time.perf_counter() - wall, time.process_time() - cpu)
        return self._metrics

    def _after_step(self) -> None:
        super()._after_step()
        self.steps.append(self._step(self.sampled[-1]))
        self._begin()
        self.on_step(self.step)

    def _step(self, rollouts: Sequence[Rollout]) -> Step:
        """Return what the step that ends now took."""
        wall = time.perf_counter() - self._started[0]
        cpu = time.process_time() - self._started[1]
        delta = self._metrics.get("mem/actor_update_delta_peak_GB")
        return Step(
            by_phase(self.spans.take_spans(), wall),
            self._inside[0],
            cpu,
            self._inside[1],
            None if delta is None else round(delta * GIB),
            lengths_of(rollouts),
            sum(r.truncated for r in rollouts),
        )

    def _evaluate(self, subject: Subject, sets: list[str] | None = None) -> bool:
        return subject is AFTER and self.evaluates and super()._evaluate(subject, sets)

    def _save(self, directory: Path) -> Path:
        return directory

    def _last_checkpoint(self, why: str) -> Path:
        if self.stopped_by is not None:
            raise Interrupted(self.stopped_by)
        raise TrainingStopped(f"{why}. A measurement saves nothing")

    def _finish(self, student: Path) -> Summary:
        self.log.close_progress()
        return Summary(
            self.directory,
            student,
            self.step,
            False,
            self.evaluator.results,
            dict(self.timer.total),
            self.delta_peak_gb,
            None,
        )

    # After the run ---------------------------------------------------------------------------

    def replay(self, rollouts: Sequence[list[Rollout]]) -> list[Step]:
        """Make further updates on these rollouts, one a step, and return what they took."""
        made = []
        for given in rollouts:
            self._begin()
            self._update(given)
            self.step += 1
            made.append(self._step(given))
        return made

    def idle(self) -> tuple[float | None, float | None]:
        """Return the share of the time in which the GPU runs no kernel, in rollout and update.

        One more step is made under `torch.profiler`, with responses of at most `PROFILED_TOKENS`.
        None if this can't be seen: on a CPU, and in an engine's process.
        """
        if self.device.type != "cuda":
            return None, None
        limit = self.cfg.rollout.max_new_tokens
        self.cfg.rollout.max_new_tokens = min(limit, PROFILED_TOKENS)
        rollout = idle_share(self.device, self._rollouts)
        self.cfg.rollout.max_new_tokens = limit
        update = idle_share(self.device, lambda: self.replay(self.sampled[-1:]))
        return None if samples_elsewhere(self.cfg) else rollout, update

    def timeline(self, rollouts: list[Rollout]) -> Timeline | None:
        """Make one more update on these rollouts, and return its memory over time."""
        self.spans.take_spans()
        with recorded(self.device) as recording:
            self._update(rollouts)
        self.step += 1
        return recording.timeline(stretches(self.spans.take_spans()))


def samples_elsewhere(cfg: TrainConfig) -> bool:
    """Return whether another process samples, whose work this one doesn't see."""
    return cfg.rollout.engine == "vllm" or cfg.rollout.staleness > 0


def lengths_of(rollouts: Sequence[Rollout]) -> Lengths:
    """Return the lengths of a step's rollouts."""
    return Lengths(
        [len(r.prompt_ids) for r in rollouts],
        [len(r.response_ids) for r in rollouts],
        [len(r) if r.reading is None else len(r.reading) for r in rollouts],
    )

"""``oprd-gains --step``: whole training steps, objective against objective on the same prompts.

Every objective is trained by ``oprd-train``'s own trainer, from the same student, with the same
prompts and seed. Three ways of counting are measured, since each answers another question:

- the update alone, on the same rollouts for all objectives;
- the step at equal lengths: teacher and update on these rollouts, and what the rest of a step takes
  where they are sampled;
- the step at each objective's own lengths, as it trains.

The same rollouts are those that the student samples in OPRD's measured steps of the first round.
Each run replays them after its own steps. Rounds go through the objectives in turns, there and
back (A B C, C B A), so that a machine that slows down steadily favours none.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from oprd import distributed
from oprd.benchmark.report import mib
from oprd.benchmark.step_config import OPRD, StepConfig, title, variant
from oprd.benchmark.step_flops import measured_peak
from oprd.benchmark.step_memory import Timeline
from oprd.benchmark.step_trainer import MeasuredTrainer, Step
from oprd.config import TrainConfig, check_values
from oprd.data.rollout import Rollout
from oprd.distributed.device import check_device
from oprd.errors import ConfigError, attempts
from oprd.memory_plan.config import PlanConfig
from oprd.memory_plan.report import shapes
from oprd.memory_plan.run import STEP, UPDATE, TrainingPlan, make_training_plan
from oprd.memory_plan.shapes import Shape
from oprd.observability.console import LOGGER
from oprd.observability.memory import available_bytes
from oprd.observability.summary import EvalResult
from oprd.observability.tables import show
from oprd.output_paths import check_output_dir
from oprd.training.evaluator import AFTER
from oprd.training.inputs import RunInputs
from oprd.training.model_checks import check_models
from oprd.training.preflight import check_run, choose_defaults, preflight

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """A row, checked and ready to run.

    Attributes:
        shape: shapes of the student and the first teacher; None if the planner doesn't know them.
    """

    name: str
    cfg: TrainConfig
    inputs: RunInputs
    shape: tuple[Shape, Shape] | None = None

    @property
    def title(self) -> str:
        """The row's title."""
        return title(self.name, self.cfg)

    def plan(
        self, device: torch.device, prompt: int, response: int, recomputed: int | None = None
    ) -> TrainingPlan | None:
        """Predict the memory of a run with prompts and responses of these lengths.

        Args:
            recomputed: the number of recomputed blocks; None: as configured.
        """
        if self.shape is None:
            return None
        student_options = self.cfg.student
        if recomputed is not None:
            student_options = replace(student_options, gradient_checkpointing=recomputed)
        cfg = replace(
            self.cfg,
            student=student_options,
            data=replace(self.cfg.data, max_prompt_tokens=prompt),
            rollout=replace(self.cfg.rollout, max_new_tokens=response),
        )
        student, teachers = shapes(cfg, PlanConfig())
        on_gpu = device.type == "cuda"
        memory = available_bytes(device)
        return make_training_plan(
            cfg, student, teachers, 1, memory, on_gpu, self.inputs.bridge_ranks
        )


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


def prepare(run: TrainConfig, step: StepConfig, dry_run: bool) -> list[Prepared]:
    """Check every row's configuration, prompts and models' configurations; load no weights.

    Raises:
        ConfigError: for the first row that can't run; the message names it.
    """
    step.check(run, distributed.world_size())
    made: list[Prepared] = []
    for name in step.rows(run):
        cfg = variant(name, run, step)
        cfg.output_dir = str(Path(tempfile.gettempdir(), f"oprd-gains-{os.getpid()}"))
        try:
            if made:  # the prompts are the same
                inputs = _checked_again(cfg, made[0].inputs, dry_run)
            else:
                inputs = preflight(cfg, dry_run)
        except ConfigError as error:
            if name == OPRD:
                raise
            raise ConfigError(
                f"{name}: {error}\nto measure the others, leave it out of step.objectives"
            ) from error
        made.append(Prepared(name, cfg, inputs, _shapes(cfg)))
    return made


def _checked_again(cfg: TrainConfig, first: RunInputs, dry_run: bool) -> RunInputs:
    """Do what `preflight` does, but for loading the prompts of ``first`` once more."""
    check_values(cfg)
    inputs = RunInputs()
    attempt = attempts(inputs.unchecked, dry_run)
    on_gpu = check_device(cfg.device).type == "cuda"
    inputs.notes += choose_defaults(cfg, attempt, on_gpu, 1)
    check_run(cfg, inputs, 1)
    check_models(cfg, inputs, attempt, dry_run, cfg.fsdp.active(1))
    return replace(
        inputs, train=first.train, eval_sets=first.eval_sets, teacher_sets=first.teacher_sets
    )


def _shapes(cfg: TrainConfig) -> tuple[Shape, Shape] | None:
    try:
        student, teachers = shapes(cfg, PlanConfig())
    except ConfigError:
        return None
    return student, next(iter(teachers.values()))


def check_memory(rows: list[Prepared], device: torch.device) -> None:
    """Check that every row's run fits in memory with responses of the greatest length.

    Raises:
        ConfigError: naming the rows that don't fit.
    """
    available = available_bytes(device)
    if available is None:
        return
    wide, fits = [], []
    for row in rows:
        plan = row.plan(device, row.cfg.data.max_prompt_tokens, row.cfg.rollout.max_new_tokens)
        if plan is not None and plan.total > available:
            wide.append(f"{row.name} needs {mib(plan.total)} MiB ({plan.worst})")
        else:
            fits.append(row.name)
    if wide:
        leave = f"--step.objectives '[{','.join(fits)}]', or " if OPRD in fits else ""
        raise ConfigError(
            f"{mib(available)} MiB are available: {'; '.join(wide)}. Measure fewer objectives "
            f"({leave}lower rollout.max_new_tokens or micro_batch_tokens), or set "
            "student.gradient_checkpointing"
        )


def delta_parts(plan: TrainingPlan) -> dict[str, int]:
    """Return what the plan says an update adds to what is resident before it, by name.

    Training frees the gradients after each step, so they count; the teacher's outputs are there.
    """
    update = dict(plan.moments[UPDATE].terms)
    for name in ("teacher's outputs", "teacher's gathered embedding and head"):
        update.pop(name, None)
    terms = max(update, plan.moments[STEP].terms, key=lambda terms: sum(terms.values()))
    return {"gradients": plan.resident["gradients"]} | terms


def measure(
    rows: list[Prepared],
    step: StepConfig,
    device: torch.device,
    directory: Path,
    console: Console,
) -> dict[str, Measured]:
    """Measure every row in rounds, there and back.

    Args:
        directory: an existing directory for the runs' files, which are not kept.
        console: where it says what it measures.
    """
    measured = {row.name: Measured() for row in rows}
    shared: list[list[Rollout]] = []
    for round_ in range(step.rounds):
        for row in rows if round_ % 2 == 0 else rows[::-1]:
            console.print(f"round {round_ + 1} of {step.rounds}: {row.title}", markup=False)
            cfg = copy.deepcopy(row.cfg)
            cfg.output_dir = str(directory / f"{row.name}_{round_ + 1}")
            _run(row, cfg, step, measured[row.name], shared, round_ == step.rounds - 1)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return measured


def _run(
    row: Prepared,
    cfg: TrainConfig,
    step: StepConfig,
    measured: Measured,
    shared: list[list[Rollout]],
    is_last: bool,
) -> None:
    """Run one row once. Fills ``shared`` with its rollouts if that is empty."""
    total = step.warmup + step.steps
    cfg.steps = max(cfg.steps, total)
    trainer = MeasuredTrainer(cfg, row.inputs, total, step.evaluate and is_last)
    with trainer.closing:
        summary = trainer.run()
        measured.own.append(trainer.steps[step.warmup :])
        if not shared:
            shared += trainer.sampled[step.warmup :]
        measured.equal.append(trainer.replay(shared))
        if is_last:
            measured.idle = _extra("idle share", trainer.idle) or (None, None)
            measured.timeline = _extra("memory over time", lambda: trainer.timeline(shared[0]))
            measured.recomputed = trainer.update.recomputed
            measured.accuracy = dict(summary.evaluations.get(AFTER.label, {}))


T = TypeVar("T")


def _extra(what: str, measure: Callable[[], T]) -> T | None:
    """Return a measurement, or None with a warning if it fails: the rest is not lost for it.

    It reads records of torch that have no stable interface.
    """
    try:
        return measure()
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        logger.warning(f"{what}: not measured, {type(error).__name__}: {error}")
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show warnings, and what takes long, on stderr; nothing of the runs on stdout."""
    slow = logging.getLogger("oprd.observability.progress")
    handlers, level = LOGGER.handlers[:], LOGGER.level
    there = logging.StreamHandler()
    LOGGER.handlers[:] = [there]
    LOGGER.setLevel(logging.WARNING)
    slow.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.handlers[:] = handlers
        LOGGER.setLevel(level)
        slow.setLevel(logging.NOTSET)


def run_step(
    run: TrainConfig, step: StepConfig, command: str, dry_run: bool, as_json: bool
) -> dict[str, Any] | None:
    """Predict, and unless ``dry_run`` also measure; print tables or JSON, and return the report.

    Args:
        run: the training run. Its ``output_dir`` is where the caller writes the report.
        command: the command line, for the report.

    Returns:
        None after a dry run.

    Raises:
        ConfigError: if anything is wrong, or memory too small, before weights are loaded.
        TrainingStopped: if a run can't go on.
    """
    from oprd.benchmark import step_report, step_tables

    console = Console(highlight=False)
    if run.output_dir is not None:
        check_output_dir(run.output_dir, step_report.FILES)
    rows = prepare(run, step, dry_run)
    device = check_device(run.device)
    if dry_run:
        predicted = step_report.predictions(rows, command, device)
        if as_json:
            print(json.dumps(predicted, indent=1))
        else:
            show(console, [step_tables.prediction_table(predicted)])
        return None
    check_memory(rows, device)
    peak = measured_peak(device, step_report.product_dtype(rows[0].cfg))
    stderr = Console(stderr=True, highlight=False)
    joined_by_caller = distributed.joined()
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="oprd-gains-") as directory:
            measured = measure(rows, step, device, Path(directory), stderr)
    finally:
        if not joined_by_caller:
            distributed.shutdown()
    report = step_report.make_report(rows, step, measured, command, device, peak)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show(console, step_tables.tables(report))
    return report

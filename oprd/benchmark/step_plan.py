"""The runs of ``oprd-gains --step``: checked, and planned, before weights are loaded."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from oprd import distributed
from oprd.benchmark.report import mib
from oprd.benchmark.step_config import OPRD, StepConfig, title, variant
from oprd.config import TrainConfig, check_values
from oprd.distributed.device import check_device
from oprd.errors import ConfigError, attempts
from oprd.memory_plan.config import PlanConfig
from oprd.memory_plan.report import shapes
from oprd.memory_plan.run import STEP, UPDATE, TrainingPlan, make_training_plan
from oprd.memory_plan.shapes import Shape
from oprd.observability.memory import available_bytes
from oprd.training.inputs import RunInputs
from oprd.training.model_checks import check_models
from oprd.training.preflight import check_run, choose_defaults, preflight


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

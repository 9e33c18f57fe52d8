"""The table that ``oprd-train --dry_run --plan.gpus 8`` prints."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from rich.console import Console

from oprd.config import TrainConfig
from oprd.errors import ConfigError, Unreachable
from oprd.memory_plan.advice import advice
from oprd.memory_plan.config import PlanConfig
from oprd.memory_plan.known_shapes import EXAMPLE, KNOWN_SHAPES
from oprd.memory_plan.run import TrainingPlan, gib, make_training_plan
from oprd.memory_plan.shapes import Shape
from oprd.models.loading import load_config
from oprd.observability.memory import GIB
from oprd.observability.tables import TextTable, show

logger = logging.getLogger(__name__)


def shapes(cfg: TrainConfig, plan: PlanConfig) -> tuple[Shape, dict[str, Shape]]:
    """Return the shapes of student and teachers, from ``plan`` or else from their configurations.

    Models of the shipped recipes need neither (`oprd.memory_plan.known_shapes`).

    Raises:
        ConfigError: if a shape is not given and its configuration can't be loaded, or if the
            planner does not know the kind of model.
    """

    def shape(path: str, option: str) -> Shape:
        try:
            return Shape.of(load_config(path))
        except Unreachable as error:
            if path in KNOWN_SHAPES:
                logger.info(f"note: {path} can't be loaded here; its shape is known")
                return KNOWN_SHAPES[path]
            raise ConfigError(
                f"{str(error).rstrip('.')}. To plan without the model, add its shape to the "
                f"command, as in --{option} {EXAMPLE}"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error

    student = plan.student or shape(cfg.student.path, "plan.student")
    given = plan.teacher or (student if plan.student else None)
    teachers = {
        name: student if t.is_self else given or shape(t.path, "plan.teacher")
        for name, t in cfg.all_teachers.items()
    }
    return student, teachers


def plan_table(made: TrainingPlan, gpus: int) -> TextTable:
    """Make the table of a plan: what is resident, and each phase at its peak."""
    rows: list[tuple[str, ...]] = [(name, gib(size)) for name, size in made.resident.items()]
    for phase, moment in made.moments.items():
        rows += [(), (f"{phase}, at its peak: {moment.name}", gib(moment.total))]
        rows += [(f"  {name}", gib(size)) for name, size in moment.terms.items() if size > GIB / 20]
    return TextTable(f"GiB on each of {gpus} GPUs", ("what", "GiB"), rows)


def show_training_plan(
    cfg: TrainConfig, plan: PlanConfig, ranks: Mapping[str, int] | None = None
) -> bool:
    """Print the memory that each GPU would need and whether it fits; return whether it fits.

    Args:
        ranks: ranks of the bridges in their files, by teacher.

    Raises:
        ConfigError: if a shape (see `shapes`) or the memory of a GPU is not known.
    """
    assert plan.gpus is not None
    if plan.memory_gib is not None:
        memory = int(plan.memory_gib * GIB)
    elif torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        raise ConfigError(
            "plan.memory_gib is not set, and this machine has no GPU: set it to the GiB of each GPU"
        )
    student, teachers = shapes(cfg, plan)
    made = make_training_plan(cfg, student, teachers, plan.gpus, memory, ranks=ranks)
    fits = made.total <= memory
    difference = gib(abs(memory - made.total))
    verdict = f"fits, {difference} GiB to spare" if fits else f"does not fit by {difference} GiB"
    console = Console(highlight=False, soft_wrap=True)
    show(console, [plan_table(made, plan.gpus)])
    console.print(
        f"{gib(made.total)} GiB at most, in the phase {made.worst!r}, of {gib(memory)} GiB:"
    )
    console.print(f"{verdict}. Not counted: CUDA's context, NCCL's buffers (1-2 GiB)")
    if not fits:
        console.print(advice(cfg, student, teachers, plan.gpus, memory, ranks))
    return fits

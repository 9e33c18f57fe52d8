"""Configuration of ``oprd-gains --step``: its options, and the runs that it compares."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from oprd.config import BridgeConfig, TrainConfig
from oprd.config.checkpoint import CheckpointConfig
from oprd.config.logging import LoggingConfig
from oprd.config.types import Positions
from oprd.distill.objectives import REP
from oprd.errors import Problems
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES

OPRD = "oprd"
CONFIGURED = "configured"
"""The row of the objectives that the training configuration names, if it names several."""


@dataclass(frozen=True)
class Row:
    """A row of the tables: what `TrainConfig` is changed to.

    Attributes:
        title: its title; ``{k}`` stands for the number of tokens in a top-k loss or in ``last_k``.
        objectives: as in `TrainConfig`.
        materialised: the output-space losses compute [B, T, V] logits, instead of chunks.
        positions, layers: as in `DistillConfig`; None: as configured.
    """

    title: str
    objectives: tuple[str, ...]
    materialised: bool = False
    positions: Positions | None = None
    layers: str | None = None


def _opd(name: str, objective: str) -> Row:
    chosen = PLANNER_OBJECTIVES[name]
    title = chosen.title.replace("top-k", "top-{k}")
    return Row(title, (objective,), materialised=chosen.is_materialised)


ROWS = {
    OPRD: Row("OPRD, all positions", (REP,), positions="all"),
    "oprd_last_k": Row("OPRD, last {k} positions", (REP,), positions="last_k"),
    "oprd_last": Row("OPRD, last layer", (REP,), positions="all", layers="last"),
    "opd_top1": _opd("opd_top1", "opd_top1"),
    "opd_topk": _opd("opd_topk", "opd_topk_advantage"),
    "opd_full": _opd("opd_full", "opd_full"),
    "opd_top1_chunked": _opd("opd_top1_chunked", "opd_top1"),
    "opd_topk_chunked": _opd("opd_topk_chunked", "opd_topk_advantage"),
    "opd_topk_set_chunked": _opd("opd_topk_set_chunked", "opd_topk"),
    "opd_full_chunked": _opd("opd_full_chunked", "opd_full"),
}
"""What can be compared, under the names of ``oprd-gains``, in the order of tables."""
USUAL = (
    OPRD,
    "oprd_last_k",
    "opd_top1",
    "opd_topk",
    "opd_full",
    "opd_top1_chunked",
    "opd_topk_chunked",
    "opd_full_chunked",
)


@dataclass
class StepConfig:
    """Settings of a measurement of whole training steps.

    Attributes:
        objectives: objectives to measure; ``oprd``, with which the others are compared, is always
            added, and so are the run's own ``objectives`` if it has several.
        steps: number of measured steps of an objective in each round.
        warmup: number of steps before them that are not measured.
        rounds: number of rounds, each over all objectives, every other one in reverse order. For
            each step the median round is reported.
        last_k: number of positions of ``oprd_last_k``; null: ``distill.k``, or half of
            ``rollout.max_new_tokens`` if that is less.
        evaluate: evaluate each objective's student on ``eval.sets`` after its steps, for the
            picture of accuracy, time and memory. Raise ``steps`` until accuracy differs.
    """

    objectives: list[str] = field(default_factory=lambda: list(USUAL))
    steps: int = 4
    warmup: int = 1
    rounds: int = 2
    last_k: int | None = None
    evaluate: bool = False

    def check(self, run: TrainConfig, ranks: int) -> None:
        """Check the settings, and the run's options that a measurement can't have.

        Args:
            ranks: the number of processes.

        Raises:
            ConfigError: listing everything that is wrong.
        """
        problems = Problems()
        counts = ("steps", "warmup", "rounds", "last_k")
        problems.need_at_least_one({f"step.{name}": getattr(self, name) for name in counts})
        unknown = [name for name in self.objectives if name not in ROWS]
        problems.need(
            not unknown,
            f"step.objectives: unknown {', '.join(unknown)}; known: {', '.join(ROWS)}",
        )
        problems.need(
            run.resume is None,
            f"resume is {run.resume}: a measurement begins with the student as it is in "
            "student.path; leave resume out",
        )
        problems.need(
            not self.evaluate or bool(run.eval.sets),
            "step.evaluate is set, but eval.sets is empty: name an evaluation set",
        )
        problems.need(
            ranks == 1,
            f"oprd-gains measures one process, and {ranks} run: start it without torchrun",
        )
        problems.refuse()

    def rows(self, run: TrainConfig) -> list[str]:
        """Return the names of the rows, in the order of tables."""
        chosen = [name for name in ROWS if name in {OPRD, *self.objectives}]
        return [*chosen, CONFIGURED] if len(run.objectives) > 1 else chosen

    def positions(self, run: TrainConfig) -> int:
        """Return the number of positions of ``oprd_last_k``."""
        limit = run.rollout.max_new_tokens
        usual = run.distill.k if run.distill.k < limit else max(1, limit // 2)
        return self.last_k or usual


def title(name: str, cfg: TrainConfig) -> str:
    """Return a row's title, with the numbers of its configuration."""
    if name == CONFIGURED:
        parts = [(f"{w:g} " if w != 1 else "") + n for n, w in cfg.objectives.items()]
        return " + ".join(parts)
    k = cfg.distill.k if REP in ROWS[name].objectives else cfg.opd.k
    return ROWS[name].title.format(k=k)


def variant(name: str, run: TrainConfig, step: StepConfig) -> TrainConfig:
    """Return the configuration of a row: the run's, with other objectives and without files.

    Evaluations, checkpoints, trackers and diagnostics, which come every so many steps, are off.
    """
    cfg = copy.deepcopy(run)
    cfg.checkpoint, cfg.logging = CheckpointConfig(), LoggingConfig(diagnostics_every=0)
    cfg.eval.teacher, cfg.eval.keep_samples = False, False
    if step.evaluate:
        for source in cfg.eval.sets.values():
            source.every = 0
    else:
        cfg.eval.sets = {}
    if name == CONFIGURED:
        return cfg
    row = ROWS[name]
    cfg.objectives = dict.fromkeys(row.objectives, 1.0)
    cfg.opd = replace(cfg.opd, implementation="materialised" if row.materialised else "chunked")
    if row.positions is not None:
        cfg.distill = replace(
            cfg.distill,
            positions=row.positions,
            k=step.positions(run) if row.positions == "last_k" else cfg.distill.k,
            layers=row.layers or cfg.distill.layers,
        )
    if REP not in row.objectives:
        cfg.bridge, cfg.bridges = BridgeConfig(), {}  # a run with an unused bridge is refused
        cfg.distill = replace(cfg.distill, init_head_from_teacher=False)
    return cfg

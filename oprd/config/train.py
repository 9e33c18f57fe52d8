"""A run: all of its configuration, and the check of its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from oprd.config.checkpoint import CheckpointConfig
from oprd.config.data import DataConfig, EvalConfig
from oprd.config.fsdp import FsdpConfig
from oprd.config.logging import LoggingConfig
from oprd.config.models import BridgeConfig, StudentConfig, TeacherConfig
from oprd.config.objectives import DistillConfig, OpdConfig, check_weights
from oprd.config.optim import OptimConfig
from oprd.config.rollout import RolloutConfig
from oprd.config.watchdog import WatchdogConfig
from oprd.errors import Problems


@dataclass
class TrainConfig:
    """A run of ``oprd-train``.

    Attributes:
        output_dir: where everything is written; null: ``runs/<name>-<time>``. A directory that
            holds anything is refused, unless ``resume`` says to go on with it.
        resume: ``auto``: go on from the newest checkpoint in output_dir, or begin if there is none;
            or a checkpoint, or a run's directory, to go on from.
        name: of the run.
        steps: optimizer steps.
        seed: of prompts and sampling.
        device: ``auto``: the GPU of this rank, else the CPU.
        autocast: run the models' matrix products in this dtype (mixed precision); null: off.
        micro_batch_tokens: at most so many tokens, padding included, go through the models at
            once; gradients accumulate.
        packing: put the rollouts of a micro-batch one after another in a single row, without
            padding. Every model must keep them apart: transformers' ``flash_attention_2``,
            ``flash_attention_3``, ``flex_attention``, ``sdpa`` and ``eager`` do for the
            architectures here, and it is tried on the models before the first step. With ``sdpa``
            and ``eager`` attention costs as much as over one sequence of the whole row's length:
            choose one of the others for long rows.
        log_every: steps between progress lines where the output is not a terminal.
        teachers: one for each source of prompts, instead of ``teacher``.
        bridges: one for each of ``teachers``, by the same names, instead of ``bridge``.
        objectives: what is minimised, a weight for each: ``oprd``, ``opd_top1``, ``opd_topk``,
            ``opd_topk_advantage``, ``opd_topk_raw``, ``opd_full``, ``opd_full_forward``.
    """

    output_dir: str | None = None
    resume: str | None = None
    name: str = "demo"
    steps: int = 100
    seed: int = 0
    device: str = "auto"
    autocast: Literal["bfloat16"] | None = None
    micro_batch_tokens: int = 32768
    packing: bool = False
    log_every: int = 10
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objectives: dict[str, float] = field(default_factory=lambda: {"oprd": 1.0})
    distill: DistillConfig = field(default_factory=DistillConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    bridges: dict[str, BridgeConfig] = field(default_factory=dict)
    opd: OpdConfig = field(default_factory=OpdConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the source of prompts that each is for; under "", if it is one for all of them."""
        return self.teachers or {"": self.teacher}

    @property
    def all_bridges(self) -> dict[str, BridgeConfig]:
        """By the names of `all_teachers`; without a path where there is none."""
        return {name: self.bridges.get(name, self.bridge) for name in self.all_teachers}


def check_values(cfg: TrainConfig) -> None:
    """Check every value that needs no model, file or device to be checked.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    problems = Problems()
    problems.need_at_least_one(
        {
            "steps": cfg.steps,
            "log_every": cfg.log_every,
            "micro_batch_tokens": cfg.micro_batch_tokens,
        }
    )
    problems.need(
        cfg.resume != "auto" or cfg.output_dir is not None,
        "resume=auto needs an output_dir: there it looks for checkpoints",
    )
    cfg.data.check(problems)
    cfg.rollout.check(problems)
    cfg.eval.check(problems)
    check_weights(problems, cfg.objectives)
    cfg.distill.check(problems)
    cfg.opd.check(problems, cfg.objectives)
    cfg.checkpoint.check(problems, cfg.eval)
    cfg.student.lora.check(problems)
    cfg.optim.check(problems)
    cfg.watchdog.check(problems)
    _check_teachers(problems, cfg)
    _check_bridges(problems, cfg)
    _check_engine(problems, cfg)
    problems.refuse()


def _check_teachers(problems: Problems, cfg: TrainConfig) -> None:
    """Note teachers that the student or the other options leave no room for."""
    need, teachers = problems.need, cfg.all_teachers.values()
    need(
        not cfg.teachers or cfg.teacher == TeacherConfig(),
        "both teacher and teachers are given: leave one of them out",
    )
    if cfg.distill.init_head_from_teacher:
        need(
            len(cfg.teachers) < 2 and not any(t.is_self for t in teachers),
            "distill.init_head_from_teacher needs one teacher that is not the student itself",
        )
    if cfg.student.lora.rank is None:
        need(
            not any(t.path == "self:base" for t in teachers),
            "the teacher self:base is the student without its adapter, and student.lora.rank is "
            "null: give a rank, or take self:start",
        )
    else:
        need(
            not cfg.distill.init_head_from_teacher,
            "distill.init_head_from_teacher changes weights that an adapter does not hold: leave "
            "it off with student.lora",
        )


def _check_bridges(problems: Problems, cfg: TrainConfig) -> None:
    """Note bridges that do not go with the teachers or the objectives."""
    need, bridges, teachers = problems.need, cfg.bridges, cfg.teachers
    problems.need_at_least_one(
        {"bridge.rank": cfg.bridge.rank}
        | {f"bridges.{name}.rank": b.rank for name, b in bridges.items()}
    )
    compares_states = "oprd" in cfg.objectives
    if cfg.bridge.path is None:
        need(cfg.bridge.rank is None, "bridge.rank is given without bridge.path")
    else:
        need(
            compares_states,
            f"bridge.path={cfg.bridge.path} is given, but objectives {[*cfg.objectives]} compare "
            "no hidden states: add oprd, or leave the bridge out",
        )
        need(
            len(teachers) < 2,
            f"bridge.path={cfg.bridge.path} is fitted for one teacher, and teachers has "
            f"{len(teachers)}: give each its own in bridges",
        )
    if not bridges:
        return
    need(
        bridges.keys() == teachers.keys(),
        f"bridges has {', '.join(bridges)}, and teachers {', '.join(teachers) or 'nothing'}: name "
        "one bridge for each of teachers",
    )
    need(all(b.path for b in bridges.values()), "bridges: each needs a path")
    for a, b in combinations(bridges.keys() & teachers.keys(), 2):
        need(
            teachers[a] != teachers[b] or bridges[a] == bridges[b],
            f"teachers.{a} and teachers.{b} are one model with different bridges: give both "
            "the same",
        )
    need(cfg.bridge == BridgeConfig(), "both bridge and bridges are given: leave one out")
    need(
        compares_states,
        f"bridges are given, but objectives {[*cfg.objectives]} compare no hidden states: add "
        "oprd, or leave the bridges out",
    )


def _check_engine(problems: Problems, cfg: TrainConfig) -> None:
    """Note a watchdog that would end a run whose engine is still starting."""
    v, limit = cfg.rollout.vllm, cfg.watchdog.timeout_s
    problems.need(
        cfg.rollout.engine != "vllm"
        or limit is None
        or limit > max(v.start_timeout, v.step_timeout),
        f"watchdog.timeout_s={limit} must be above start_timeout={v.start_timeout} and "
        f"step_timeout={v.step_timeout} of rollout.vllm, or it ends runs whose engine is starting",
    )

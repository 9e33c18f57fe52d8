"""All options of a training run, and the checks across sections."""

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
    """Options of ``oprd-train``.

    Attributes:
        output_dir: directory that the run writes to; null: ``runs/<name>-<time>``. It must be new
            or empty, unless ``resume`` continues the run in it.
        resume: ``auto``: resume from the newest checkpoint in output_dir, or start a new run if
            there is none. Otherwise the path of a checkpoint, or of a run's directory, to resume
            from. Null: start a new run.
        name: name of the run.
        steps: number of optimizer steps.
        seed: seed of the order of prompts and of sampling.
        device: ``auto``: this rank's GPU, or the CPU if there is none.
        autocast: dtype of the models' matrix products (mixed precision); null: off. ``auto``:
            bfloat16 on a GPU if the student's weights are float32; under FSDP2 by
            ``fsdp.param_dtype``.
        micro_batch_tokens: maximum number of tokens, padding included, in a forward pass. Gradients
            are accumulated over the micro-batches of a step.
        packing: concatenate the rollouts of a micro-batch in a single row, without padding. Every
            model must keep packed rollouts separate, which is checked before the first step. In
            transformers, ``flash_attention_2``, ``flash_attention_3``, ``flex_attention``,
            ``sdpa`` and ``eager`` do so for the supported architectures. With ``sdpa`` and
            ``eager``, attention costs as much as over one sequence of the row's length, so use one
            of the others for long rows.
        overlap: run the teacher on the next micro-batch beside the student's update on this one, on
            a stream of its own. Results are the same. The outputs of two teacher passes are held.
            The teacher must have weights of its own, on every rank whole (``fsdp.teacher``). Not
            measured on a GPU yet.
        log_every: number of steps between progress lines if the output is not a terminal.
        teachers: one teacher for each source of prompts, by source, instead of ``teacher``.
        objectives: weight of each objective: ``oprd``, ``opd_top1``, ``opd_topk``,
            ``opd_topk_advantage``, ``opd_topk_raw``, ``opd_full``, ``opd_full_forward``,
            ``opd_jsd``.
        bridges: one bridge for each of ``teachers``, by the same names, instead of ``bridge``.
    """

    output_dir: str | None = None
    resume: str | None = None
    name: str = "oprd"
    steps: int = 100
    seed: int = 0
    device: str = "auto"
    autocast: Literal["auto", "bfloat16"] | None = "auto"
    micro_batch_tokens: int = 32768
    packing: bool = False
    overlap: bool = False
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
        """The teachers by source of prompts; a single teacher for all sources has the name ""."""
        return self.teachers or {"": self.teacher}

    @property
    def all_bridges(self) -> dict[str, BridgeConfig]:
        """The bridge of each teacher in `all_teachers`; its path is None if there is no bridge."""
        return {name: self.bridges.get(name, self.bridge) for name in self.all_teachers}


def check_values(cfg: TrainConfig) -> None:
    """Check all values that can be checked without models, files or devices.

    Raises:
        ConfigError: with all problems.
    """
    problems = Problems()
    problems.need_at_least_one(
        {
            "steps": cfg.steps,
            "log_every": cfg.log_every,
            "micro_batch_tokens": cfg.micro_batch_tokens,
            "student.context_length": cfg.student.context_length,
        }
        | {f"teacher {n}.context_length": t.context_length for n, t in cfg.all_teachers.items()}
    )
    problems.need(
        cfg.resume != "auto" or cfg.output_dir is not None,
        "resume=auto needs an output_dir, in which it looks for checkpoints",
    )
    cfg.data.check(problems)
    cfg.rollout.check(problems)
    cfg.eval.check(problems)
    blocks = cfg.student.gradient_checkpointing
    problems.need(
        blocks == "auto" or int(blocks) >= 0,
        f"student.gradient_checkpointing must be true, false, auto or a number of blocks from 0, "
        f"got {blocks}",
    )
    check_weights(problems, cfg.objectives)
    cfg.distill.check(problems)
    cfg.opd.check(problems, cfg.objectives)
    problems.need(
        "opd_top1" not in cfg.objectives or cfg.rollout.top_p == 1,
        f"rollout.top_p={cfg.rollout.top_p} with opd_top1, whose tokens must be drawn from the "
        "student's whole distribution: set rollout.top_p to 1, or use opd_topk or opd_full",
    )
    problems.need(
        cfg.student.dtype != "float16",
        "student.dtype=float16 can't be trained: AdamW's epsilon of 1e-8 is 0 in float16, and the "
        "weights are NaN after a step. Use bfloat16 or float32",
    )
    is_narrow = cfg.student.dtype == "bfloat16" and cfg.student.lora.rank is None
    problems.need(
        cfg.optim.rounding == "nearest" or is_narrow,
        "optim.rounding=stochastic is for bfloat16 weights, and this run trains float32 weights: "
        "set student.dtype=bfloat16 (without an adapter), or leave optim.rounding out",
    )
    cfg.checkpoint.check(problems, cfg.eval)
    cfg.student.lora.check(problems)
    cfg.optim.check(problems)
    cfg.watchdog.check(problems)
    _check_teachers(problems, cfg)
    _check_bridges(problems, cfg)
    _check_engine(problems, cfg)
    problems.refuse()


def _check_teachers(problems: Problems, cfg: TrainConfig) -> None:
    """Add a problem for teachers that do not fit the student or other options."""
    need, teachers = problems.need, cfg.all_teachers.values()
    need(
        not cfg.teachers or cfg.teacher.path == TeacherConfig.path,
        "both teacher and teachers are given: leave one of them out",
    )
    for name, teacher in cfg.all_teachers.items():
        who = f"teachers.{name}" if name else "teacher"
        need(
            not (teacher.shares_student and (teacher.compile or teacher.fp8 or teacher.liger)),
            f"{who}.path={teacher.path} is the student itself, which has no compile, liger and fp8 "
            f"of its own: set student.compile or student.liger, and leave them out of {who}",
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
            "null: give a rank, or use self:start",
        )
    else:
        need(
            not cfg.distill.init_head_from_teacher,
            "distill.init_head_from_teacher changes weights that an adapter does not contain: turn "
            "it off with student.lora",
        )


def _check_bridges(problems: Problems, cfg: TrainConfig) -> None:
    """Add a problem for bridges that do not fit the teachers or the objectives."""
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
            f"bridge.path={cfg.bridge.path} is fitted for one teacher, but teachers has "
            f"{len(teachers)}: give each teacher its own bridge in bridges",
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
    """Add a problem if the watchdog could end a run whose engine is still starting."""
    v, limit = cfg.rollout.vllm, cfg.watchdog.timeout_s
    problems.need(
        cfg.rollout.engine != "vllm"
        or limit is None
        or limit > max(v.start_timeout, v.step_timeout),
        f"watchdog.timeout_s={limit} must be above start_timeout={v.start_timeout} and "
        f"step_timeout={v.step_timeout} of rollout.vllm, or it ends runs whose engine is starting",
    )

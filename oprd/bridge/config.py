"""The configuration of ``oprd-bridge fit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd import distributed
from oprd.bridge.sgd import SgdConfig
from oprd.config import DataConfig, DistillConfig, RolloutConfig, StudentConfig, TeacherConfig
from oprd.config.types import Positions, Shift
from oprd.errors import Problems


@dataclass
class FitConfig:
    """The configuration of ``oprd-bridge fit``.

    Attributes:
        output: the file to write. It must not exist.
        rank: r, the number of the teacher's principal directions. Any smaller rank is a slice of
            the result (``bridge.rank`` in training).
        prompts: number of prompts of ``data.train`` to roll out, chosen at random by ``seed``.
        layers: student layers to fit, as ``distill.layers``. With ``all``, training can use any
            layers.
        positions, k, shift: the hidden states to fit on, as in ``distill``.
        held_out: share of the prompts whose responses are used to evaluate the bridge instead of
            fitting it.
        solver: ``ridge``: closed form; ``sgd``: AdamW on a sample of rows kept in memory, as in the
            paper.
        ridge: strength of the penalty, relative to the mean squared hidden state.
        products: dtype of the statistics' matrix products. float32 is for GPUs that are slow in
            float64 (sums stay float64).
        seed: seed for the choice of prompts, sampling, the random projector of the comparison, and
            sgd.
        device: ``auto``: the GPU of this rank, or the CPU if there is none.
        autocast: dtype of the models' matrix products; null, and ``auto``, which is training's
            default: off.
        micro_batch_tokens: maximum number of tokens, padding included, that go through the models
            at once.
        student, teacher, data, rollout: as in training. Options that only training uses are
            refused: an adapter, several sources, vLLM, ..
    """

    output: str = "bridge.safetensors"
    rank: int = 8
    prompts: int = 2000
    layers: str | list[int] = "all"
    positions: Positions = DistillConfig.positions
    k: int = DistillConfig.k
    shift: Shift = DistillConfig.shift
    held_out: float = 0.1
    solver: Literal["ridge", "sgd"] = "ridge"
    ridge: float = 1e-6
    products: Literal["float64", "float32"] = "float64"
    seed: int = 0
    device: str = "auto"
    autocast: Literal["auto", "bfloat16"] | None = "auto"
    micro_batch_tokens: int = 32768
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sgd: SgdConfig = field(default_factory=SgdConfig)


def check_values(cfg: FitConfig) -> None:
    """Check the values of a configuration by themselves, without loading anything.

    Raises:
        ConfigError: if any value is invalid. The message lists all problems.
    """
    problems = Problems()
    need = problems.need
    cfg.data.check(problems)
    cfg.rollout.check(problems)
    problems.need_at_least_one(
        {
            "rank": cfg.rank,
            "k": cfg.k,
            "micro_batch_tokens": cfg.micro_batch_tokens,
            "sgd.epochs": cfg.sgd.epochs,
            "sgd.batch_rows": cfg.sgd.batch_rows,
            "sgd.max_rows": cfg.sgd.max_rows,
        }
    )
    need(cfg.prompts >= 2, f"prompts must be at least 2 (one is held out), got {cfg.prompts}")
    need(0 < cfg.held_out < 1, f"held_out must lie in (0, 1), got {cfg.held_out}")
    need(cfg.ridge >= 0, f"ridge must not be negative, got {cfg.ridge}")
    need(cfg.sgd.lr > 0, f"sgd.lr must be above 0, got {cfg.sgd.lr}")
    _check_unused(problems, cfg)
    ranks = distributed.world_size()
    need(
        cfg.solver == "ridge" or ranks == 1,
        f"solver=sgd keeps rows in memory and runs on one rank, there are {ranks}: use "
        "solver=ridge, which gives the exact result over any number of ranks",
    )
    need(
        cfg.rollout.prompts_per_step >= ranks,
        f"rollout.prompts_per_step={cfg.rollout.prompts_per_step} leaves some of {ranks} ranks "
        "nothing to do",
    )
    problems.refuse()


def _check_unused(problems: Problems, cfg: FitConfig) -> None:
    """Refuse training options that a fit would ignore.

    The bridge would otherwise be fitted for something else than the configuration says.
    """
    need, student, data = problems.need, cfg.student, cfg.data
    need(
        cfg.rollout.engine in ("auto", "generate"),
        f"rollout.engine={cfg.rollout.engine} has no use here: a fit samples with generate. Leave "
        "it out, and set rollout.batch_size to fit the memory",
    )
    need(
        cfg.rollout.staleness == 0,
        f"rollout.staleness={cfg.rollout.staleness} has no use here: a fit does not update the "
        "student. Leave it out",
    )
    for name, given in {
        "student.gradient_checkpointing": student.gradient_checkpointing,
        "student.compile": student.compile,
        "teacher.compile": cfg.teacher.compile,
    }.items():
        need(not given, f"{name} has no use here: a fit trains no model. Leave it out")
    need(
        not cfg.teacher.fp8,
        "teacher.fp8 has no use here: a bridge is fitted to the teacher's own states. Leave "
        "it out; training with this bridge may use it",
    )
    adapter = student.lora.given
    need(
        not adapter,
        f"student.lora.{', '.join(adapter)} has no use here: a fit trains nothing, and loads the "
        "student from its path without an adapter. Leave it out: a new adapter does not change the "
        "hidden states, so the bridge can be used for training with one",
    )
    need(
        not data.sources,
        f"data.sources has {', '.join(data.sources)}: a fit is for one teacher, and reads only "
        "data.train. Give the prompts of that teacher's source as data.train",
    )
    need(
        data.train.source_field is None,
        f"data.train.source_field={data.train.source_field} has no use here: a fit is for one "
        "teacher, and reads all of data.train. Give it a file of that teacher's prompts",
    )
    need(
        not cfg.teacher.is_self,
        f"teacher.path={cfg.teacher.path} is the student itself: hidden states of the same model "
        "need no bridge. Name another model, or train without bridge.path",
    )

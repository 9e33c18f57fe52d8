"""Checks and memory predictions for `oprd.benchmark.gains`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oprd.benchmark.config import SHAPE_FLAGS, GainsConfig
from oprd.distill.chunked import chunk_rows
from oprd.errors import ConfigError, Problems
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES
from oprd.memory_plan.shapes import DTYPE_BYTES, Shape, Update
from oprd.memory_plan.update import Moment, predict, ready_bytes, resident
from oprd.observability.memory import GIB

MODE_TITLES = {
    "on": "gradient checkpointing on",
    "off": "gradient checkpointing off",
    "equal": "at equal memory",
}
"""Names of the modes in titles."""


def check(cfg: GainsConfig, dry_run: bool) -> None:
    """Check the flags.

    Args:
        cfg: the settings, their shape complete (`GainsConfig.with_shape`).

    Raises:
        ConfigError: if any is wrong; the message lists all problems.
    """
    problems = Problems()
    need = problems.need
    counts = (
        "d",
        "layers",
        "heads",
        "kv_heads",
        "intermediate",
        "batch",
        "prompt",
        "rank",
        "chunk",
        "rounds",
        "shards",
    )
    problems.need_at_least_one({name: getattr(cfg, name) for name in counts})
    need(
        cfg.tokens > cfg.prompt,
        f"tokens is {cfg.tokens} and prompt {cfg.prompt}: no token is left to supervise; "
        "raise --tokens or lower --prompt",
    )
    need(cfg.vocab >= 2, f"vocab must be at least 2, got {cfg.vocab}")
    needs_two = "opd_topk_set_chunked" in cfg.objectives
    need(
        not needs_two or cfg.k >= 2,
        f"k must be at least 2 for opd_topk_set_chunked, got {cfg.k}: on one token the loss is "
        "always 0",
    )
    need(1 <= cfg.k <= cfg.vocab, f"k must lie between 1 and vocab ({cfg.vocab}), got {cfg.k}")
    heads, kv_heads = cfg.heads or 0, cfg.kv_heads or 0
    need(
        heads <= 0 or cfg.d % (2 * heads) == 0,
        f"d must be a multiple of 2 * heads (rotary embeddings need an even head width), got "
        f"d {cfg.d} and heads {heads}; without --heads they are derived from d",
    )
    need(
        kv_heads <= 0 or heads % kv_heads == 0,
        f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})",
    )
    unknown = [name for name in cfg.objectives if name not in PLANNER_OBJECTIVES]
    need(
        not unknown,
        f"unknown objectives {', '.join(unknown)}; known: {', '.join(PLANNER_OBJECTIVES)}",
    )
    need(
        cfg.shards <= 1 or dry_run,
        f"shards is {cfg.shards}, but only one process is measured: leave shards at 1, or add "
        "--dry_run to predict only",
    )
    usual = GainsConfig().with_shape()
    changed = [name for name in SHAPE_FLAGS if getattr(cfg, name) != getattr(usual, name)]
    need(
        cfg.student.path is None or not changed,
        f"both student.path ({cfg.student.path}) and a shape by flags ({', '.join(changed)}) "
        "are given: leave one of them out",
    )
    is_equal = cfg.gradient_checkpointing == "equal"
    need(
        cfg.memory_gb is None or is_equal,
        "memory_gb is the limit of --gradient_checkpointing equal: add that, or leave it out",
    )
    need(
        cfg.memory_gb is None or cfg.memory_gb > 0,
        f"memory_gb must be above 0, got {cfg.memory_gb}",
    )
    problems.refuse()


def model_config(cfg: GainsConfig) -> Any:
    """Return the student's Hugging Face configuration."""
    from transformers import Qwen2Config

    from oprd.models.loading import load_config

    if cfg.student.path is not None:
        return load_config(cfg.student.path)
    return Qwen2Config(
        vocab_size=cfg.vocab,
        hidden_size=cfg.d,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        intermediate_size=cfg.intermediate,
        tie_word_embeddings=cfg.tied,
        max_position_embeddings=max(cfg.tokens, 32768),
    )


def shape_of(config: Any, whose: str) -> Shape:
    """Return the planner's shape of a configuration.

    Raises:
        ConfigError: if the planner does not know the kind of model.
    """
    try:
        return Shape.of(config)
    except ValueError as error:
        raise ConfigError(f"{whose}: {error}") from error


def update_of(cfg: GainsConfig, checkpointing: bool | int, on_gpu: bool, vocab: int) -> Update:
    """Return the planner's description of the update."""
    return Update(
        batch=cfg.batch,
        tokens=cfg.tokens,
        rows=cfg.batch * (cfg.tokens - cfg.prompt),
        dtype_bytes=DTYPE_BYTES[cfg.dtype],
        checkpointing=checkpointing,
        chunk=cfg.chunk or chunk_rows(vocab, on_gpu),
        k=cfg.k,
        widen_head=not on_gpu,
        shards=cfg.shards,
    )


@dataclass(frozen=True)
class GainsPlan:
    """The memory that a run needs.

    Attributes:
        resident: bytes resident before the updates, by name.
        peaks: the peak of each objective, by mode (`GainsConfig.modes`).
        blocks: the number of recomputed blocks of each objective, by mode.
        limit: bytes that a delta-peak may have in the mode ``equal``; None in others.
    """

    resident: dict[str, int]
    peaks: dict[str, dict[str, Moment]]
    blocks: dict[str, dict[str, int]]
    limit: int | None = None

    @property
    def worst(self) -> tuple[int, str, str]:
        """The largest delta-peak, its objective, and its mode."""
        every = [
            (m.total, o, mode) for mode, moments in self.peaks.items() for o, m in moments.items()
        ]
        return max(every)

    @property
    def total(self) -> int:
        """Bytes that the run needs at its worst moment."""
        return sum(self.resident.values()) + self.worst[0]


def make_plan(cfg: GainsConfig, student: Shape, teacher: Shape | None, on_gpu: bool) -> GainsPlan:
    """Predict the memory of a run. ``teacher`` is None if it shares the student's weights.

    Raises:
        ConfigError: if an objective can't fit ``memory_gb``.
    """

    def peak(objective: str, blocks: int) -> Moment:
        return predict(objective, student, update_of(cfg, blocks, on_gpu, student.vocab))

    chosen, layers, limit = cfg.chosen(), student.layers, None
    blocks: dict[str, dict[str, int]] = {}
    for mode in cfg.modes:
        if mode == "equal":
            full = {o: peak(o, layers).total for o in chosen}
            limit = equal_memory(cfg, full)
            # More blocks never need more memory, and fewer never more time.
            blocks[mode] = {
                o: next(n for n in range(layers + 1) if n == layers or peak(o, n).total <= limit)
                for o in chosen
            }
        else:
            blocks[mode] = dict.fromkeys(chosen, layers if mode == "on" else 0)
    peaks = {mode: {o: peak(o, n) for o, n in of.items()} for mode, of in blocks.items()}
    update = update_of(cfg, False, on_gpu, student.vocab)
    ready = ready_bytes(cfg.chosen(), student, update, cfg.rank)
    teacher_bytes = 0 if teacher is None else teacher.parameters * update.dtype_bytes
    return GainsPlan(resident(student, update, teacher_bytes, ready), peaks, blocks, limit)


def equal_memory(cfg: GainsConfig, full: dict[str, int]) -> int:
    """Return the bytes that every objective's delta-peak must fit in the mode ``equal``.

    Args:
        full: the delta-peak of each objective with all blocks recomputed.

    Raises:
        ConfigError: if that is more than ``memory_gb``.
    """
    if cfg.memory_gb is None:
        materialised = [full[o] for o in full if PLANNER_OBJECTIVES[o].is_materialised]
        return max(materialised or full.values())
    limit = int(cfg.memory_gb * GIB)
    if wide := [f"{o} {mib(size)}" for o, size in full.items() if size > limit]:
        raise ConfigError(
            f"memory_gb={cfg.memory_gb:g} is {mib(limit)} MiB, and with all blocks recomputed some "
            f"updates need more: {', '.join(wide)} MiB. Raise it, or leave them out (--objectives)"
        )
    return limit


def check_memory(plan: GainsPlan, available: int | None) -> None:
    """Check that a run fits in memory.

    Args:
        available: available bytes; None if unknown: nothing is checked.

    Raises:
        ConfigError: if the run doesn't fit; the message gives the sizes and the flags to change.
    """
    if available is None or plan.total <= available:
        return
    peak, objective, mode = plan.worst
    instead = "set --gradient_checkpointing on, or " if mode == "off" else ""
    named = ", ".join(f"{name} {mib(size)}" for name, size in plan.resident.items() if size)
    raise ConfigError(
        f"this run needs {mib(plan.total)} MiB and {mib(available)} MiB are available: resident "
        f"({named} MiB) and {mib(peak)} MiB at the peak of {PLANNER_OBJECTIVES[objective].title!r} "
        f"({MODE_TITLES[mode]}). Lower --batch, --tokens, "
        "--layers or --vocab, use --dtype bfloat16, leave objectives out (--objectives) or "
        f"{instead}add --dry_run to predict only"
    )


def mib(size: float | None) -> str:
    """Format bytes as MiB."""
    return "-" if size is None else f"{size / 2**20:,.0f}"

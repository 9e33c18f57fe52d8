"""Configuration of ``oprd-gains``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from oprd.config import DType
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES

SHAPE_FLAGS = ("d", "layers", "heads", "kv_heads", "intermediate", "vocab", "tied")


@dataclass
class ModelPath:
    """Where a model comes from.

    Attributes:
        path: a local directory, a hub name or ``demo:NAME``; null: see student and teacher.
    """

    path: str | None = None


@dataclass
class GainsConfig:
    """Settings of a measurement of the student's update.

    Attributes:
        student: the student; null: random weights of the shape given by d to tied.
        teacher: the teacher; null: the student's own weights (time and memory don't depend on
            their values).
        d: hidden width. The defaults of d to tied are Qwen2.5-0.5B's.
        layers: number of blocks.
        heads: number of attention heads; null: as many as make heads about 64 wide, or 128 from d
            1,024 on.
        kv_heads: number of heads of keys and values; null: a divisor of heads, at most a sixth.
        intermediate: width of the MLP; null: 5.43 times d, in multiples of 128.
        vocab: |V|, the size of the vocabulary.
        tied: the LM head is the embedding table.
        batch: B, the number of sequences.
        tokens: T, the number of tokens of each sequence, prompt included.
        prompt: number of tokens of each sequence that are not supervised.
        dtype: dtype of weights, gradients and hidden states.
        device: the device; ``auto``: the GPU if there is one, else the CPU.
        gradient_checkpointing: ``on``, ``off``, ``both``, or ``equal``: for each objective the
            fewest recomputed blocks whose delta-peak fits ``memory_gb``, by the plan.
        memory_gb: with ``equal``: the delta-peak in GiB that an update may have; null: what the
            materialised objectives need with all blocks recomputed (or all, if none is measured).
        objectives: objectives to measure; ``oprd``, with which the others are compared, is always
            added.
        k: number of tokens in the top-k objectives.
        rank: rank of the Bridge's random projectors.
        chunk: number of rows per chunk in the chunked losses; null: as many as 1 GiB of
            temporaries allows (on a CPU: 256 MiB), as in training.
        rounds: number of timed rounds, each over all objectives; the median is reported. A first,
            untimed round warms up and measures memory.
        shards: with ``dry_run``: number of data-parallel ranks that share weights and gradients.
        seed: seed of weights, tokens and the teacher's outputs.
        output_dir: directory for ``gains.json`` and ``gains.md``; null: nothing is written.
    """

    student: ModelPath = field(default_factory=ModelPath)
    teacher: ModelPath = field(default_factory=ModelPath)
    d: int = 896
    layers: int = 24
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None
    vocab: int = 151936
    tied: bool = True
    batch: int = 2
    tokens: int = 192
    prompt: int = 16
    dtype: DType = "float32"
    device: str = "auto"
    gradient_checkpointing: Literal["on", "off", "both", "equal"] = "both"
    memory_gb: float | None = None
    objectives: list[str] = field(default_factory=lambda: list(PLANNER_OBJECTIVES))
    k: int = 16
    rank: int = 8
    chunk: int | None = None
    rounds: int = 3
    shards: int = 1
    seed: int = 0
    output_dir: str | None = None

    def with_shape(self) -> GainsConfig:
        """Return the configuration with the parts of the shape that are null derived from ``d``.

        The rules are those that Qwen2.5's models of 0.5 B to 7 B follow, MLPs but roughly.
        """
        d = max(self.d, 1)
        heads = d // _head_width(d) if self.heads is None else self.heads
        kv_heads, intermediate = self.kv_heads, self.intermediate
        if kv_heads is None:
            most = max(1, heads // 6)
            kv_heads = next(n for n in range(most, 0, -1) if heads % n == 0)
        if intermediate is None:
            intermediate = max(128, round(d * 4864 / 896 / 128) * 128)
        return replace(self, heads=heads, kv_heads=kv_heads, intermediate=intermediate)

    @property
    def modes(self) -> list[str]:
        """The modes of gradient checkpointing to measure."""
        chosen = self.gradient_checkpointing
        return ["on", "off"] if chosen == "both" else [chosen]

    def chosen(self) -> list[str]:
        """Return the objectives to measure, in the order of `PLANNER_OBJECTIVES`."""
        return [name for name in PLANNER_OBJECTIVES if name in {"oprd", *self.objectives}]


def _head_width(d: int) -> int:
    """Return the even divisor of ``d`` that is nearest to a usual head's width; ``d`` if odd."""
    usual = 64 if d < 1024 else 128
    widths = [width for width in range(2, d + 1, 2) if d % width == 0]
    return min(widths, key=lambda width: abs(width - usual), default=d)

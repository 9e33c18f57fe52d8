"""What ``oprd-gains`` measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config import DType
from oprd.memory_plan.update import (
    TITLES,
)

SHAPE_FLAGS = ("d", "layers", "heads", "kv_heads", "intermediate", "vocab", "tied")


@dataclass
class ModelPath:
    """A model.

    Attributes:
        path: a local directory, a hub name or ``demo:NAME``; null: see the command.
    """

    path: str | None = None


@dataclass
class GainsConfig:
    """What to measure.

    Attributes:
        student: null: random weights of the shape given by the flags.
        teacher: null: the student's own weights (time and memory don't depend on their values).
        d: hidden width; as heads, kv_heads, intermediate, vocab and tied of a Qwen2
            configuration, whose defaults here are Qwen2.5-0.5B's.
        layers: number of blocks.
        heads: of attention.
        kv_heads: of attention's keys and values.
        intermediate: width of the MLP.
        vocab: |V|.
        tied: the LM head is the embedding table.
        batch: B, sequences.
        tokens: T, of each sequence, prompt included.
        prompt: tokens of each sequence that are not supervised.
        dtype: of weights, gradients and hidden states.
        device: ``auto``: the GPU, else the CPU.
        gradient_checkpointing: ``on``, ``off`` or ``both``.
        objectives: which to measure; ``oprd``, that the others are compared with, is always one.
        k: of the top-k objectives.
        rank: of the Bridge's random projectors.
        chunk: rows at a time in the chunked losses.
        rounds: the objectives are timed in turns, so many times; the median is reported. One
            round before them warms up and measures memory.
        shards: with ``dry_run``: data-parallel ranks that weights and gradients are split over.
        seed: of weights, tokens and the teacher's outputs.
        output_dir: receives ``gains.json`` and ``gains.md``; null: nothing is written.
    """

    student: ModelPath = field(default_factory=ModelPath)
    teacher: ModelPath = field(default_factory=ModelPath)
    d: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocab: int = 151936
    tied: bool = True
    batch: int = 2
    tokens: int = 192
    prompt: int = 16
    dtype: DType = "float32"
    device: str = "auto"
    gradient_checkpointing: Literal["on", "off", "both"] = "both"
    objectives: list[str] = field(default_factory=lambda: list(TITLES))
    k: int = 16
    rank: int = 8
    chunk: int = 128
    rounds: int = 3
    shards: int = 1
    seed: int = 0
    output_dir: str | None = None

    @property
    def modes(self) -> list[bool]:
        """Gradient checkpointing on, off or both in turn."""
        return {"on": [True], "off": [False], "both": [True, False]}[self.gradient_checkpointing]

    def chosen(self) -> list[str]:
        """The objectives in the order of `TITLES`."""
        return [name for name in TITLES if name in {"oprd", *self.objectives}]

"""Configuration of ``oprd-gains``."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        heads: number of attention heads.
        kv_heads: number of heads of keys and values.
        intermediate: width of the MLP.
        vocab: |V|, the size of the vocabulary.
        tied: the LM head is the embedding table.
        batch: B, the number of sequences.
        tokens: T, the number of tokens of each sequence, prompt included.
        prompt: number of tokens of each sequence that are not supervised.
        dtype: dtype of weights, gradients and hidden states.
        device: the device; ``auto``: the GPU if there is one, else the CPU.
        gradient_checkpointing: ``on``, ``off`` or ``both``.
        objectives: objectives to measure; ``oprd``, with which the others are compared, is always
            added.
        k: number of tokens in the top-k objectives.
        rank: rank of the Bridge's random projectors.
        chunk: number of rows per chunk in the chunked losses.
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
    objectives: list[str] = field(default_factory=lambda: list(PLANNER_OBJECTIVES))
    k: int = 16
    rank: int = 8
    chunk: int = 128
    rounds: int = 3
    shards: int = 1
    seed: int = 0
    output_dir: str | None = None

    @property
    def modes(self) -> list[bool]:
        """The modes of gradient checkpointing to measure: True is on, False is off."""
        return {"on": [True], "off": [False], "both": [True, False]}[self.gradient_checkpointing]

    def chosen(self) -> list[str]:
        """Return the objectives to measure, in the order of `PLANNER_OBJECTIVES`."""
        return [name for name in PLANNER_OBJECTIVES if name in {"oprd", *self.objectives}]

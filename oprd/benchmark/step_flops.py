"""Arithmetic of a training step's model FLOPs, and the device's peak.

A token that goes through P weights takes 2P floating-point operations forward and 4P backward, half
of them for the gradient of the weights (Kaplan et al., arXiv 2001.08361, section 2.1). Attention
over t tokens adds 4 * t * heads * head_dim a block forward (scores and their sum of values), twice
that backward (Chowdhery et al., arXiv 2204.02311, appendix B); t is counted causally, T (T + 1) / 2
over a sequence of T tokens. Recomputed activations and padding are not counted: they are work that
the step does, not work that its result needs. The LM head counts where an objective reads it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oprd.config import TrainConfig
from oprd.distill.objectives import REP
from oprd.memory_plan.shapes import Shape
from oprd.models.layer_pairs import pair_layers

GPU_WIDTH, CPU_WIDTH = 8192, 1024
REPEATS = 5


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a step's phases."""

    rollout: float
    teacher: float
    update: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.rollout + self.teacher + self.update


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of a step's rollouts, one entry a rollout.

    Attributes:
        prompts, responses: of the student's tokens.
        read: of the tokens that the teacher reads, prompt included.
    """

    prompts: Sequence[int]
    responses: Sequence[int]
    read: Sequence[int]

    @property
    def whole(self) -> list[int]:
        """Prompt and response together."""
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]


def forward_flops(shape: Shape, layers: int, lengths: Sequence[int], head_rows: int) -> float:
    """Return the FLOPs of one forward pass.

    Args:
        layers: the number of blocks that are run.
        lengths: tokens of each sequence.
        head_rows: positions whose logits are computed.
    """
    blocks = 2.0 * layers * shape.block_parameters * sum(lengths)
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    attention = 4.0 * layers * shape.heads * shape.head_dim * pairs
    return blocks + attention + 2.0 * shape.vocab * shape.d * head_rows


def step_flops(cfg: TrainConfig, student: Shape, teacher: Shape, lengths: Lengths) -> StepFlops:
    """Return the FLOPs of one step.

    A chunked loss runs the teacher's LM head inside the update, where it is counted.

    Args:
        cfg: the objectives, and whether all weights or an adapter is trained.
        teacher: shape of the (first) teacher.
    """
    needs_logits = any(name != REP for name in cfg.objectives)
    pairs = pair_layers(cfg.distill.layers, student.layers, teacher.layers)
    ours = student.layers if needs_logits else 1 + max(block for block, _ in pairs)
    theirs = teacher.layers if needs_logits else 1 + max(block for _, block in pairs)
    responses = sum(lengths.responses)
    rows = responses if needs_logits else 0
    sampled = forward_flops(student, student.layers, lengths.whole, responses)
    read = forward_flops(teacher, theirs, lengths.read, 0)
    forward = forward_flops(student, ours, lengths.whole, rows)
    # With an adapter, the frozen weights get no gradient, but the states before them do.
    times = 3 if cfg.student.lora.rank is None else 2
    head = 2.0 * teacher.vocab * teacher.d * rows
    chunked = cfg.opd.implementation == "chunked"
    return StepFlops(
        rollout=sampled,
        teacher=read + (0.0 if chunked else head),
        update=times * forward + (head if chunked else 0.0),
    )


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the best of a few products of two square matrices.

    A data sheet's peak is higher: a GPU's clock falls under load, and a CPU's is rarely published.

    Args:
        dtype: that of the run's matrix products.
    """
    on_gpu = device.type == "cuda"
    n = GPU_WIDTH if on_gpu else CPU_WIDTH
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(REPEATS + 1):  # the first warms up
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
    return best

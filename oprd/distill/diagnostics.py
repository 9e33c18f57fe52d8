"""Measurements on a sample of a step's positions, which no objective needs.

Shapes: m sampled positions, d hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cosine_similarity

from oprd.models.lm_head import LMHead

TOP = 16
"""k of the overlap, as in the paper."""
ENDS = 0.2
"""Share of a response that counts as its beginning, and as its end."""
AT_ONCE = 64
"""Positions whose logits are computed at once."""


@dataclass(frozen=True)
class Sample:
    """Final states, or logits, of both models at some positions of a batch.

    Attributes:
        student: (m, d) states, or (m, V) logits if ``is_logits``.
        teacher: the teacher's at the same positions; None if it computed none.
        is_logits: whether the models put out logits.
        place: (m,) float32, where in its response each position is, from 0 to 1.
    """

    student: Tensor
    teacher: Tensor | None
    is_logits: bool
    place: Tensor


def evenly(number: int, wanted: int, device: torch.device) -> Tensor:
    """Return up to ``wanted`` of the indices below ``number``, evenly spread."""
    count = min(number, wanted)
    return torch.arange(count, device=device) * number // max(count, 1)


def places(response_mask: Tensor, tokens: Tensor) -> Tensor:
    """Return where in its response each token is, from 0 to 1.

    Args:
        response_mask: (B, T) bool. Every response follows a prompt, also in packed sequences.
        tokens: (m,) int64, positions of B * T that are in a response.
    """
    flat = response_mask.flatten().bool()
    before = torch.cat([flat.new_zeros(1), flat[:-1]])
    number = (flat & ~before).cumsum(0) - 1  # of the response
    starts = (flat & ~before).nonzero().flatten()
    lengths = torch.bincount(number[flat], minlength=len(starts))
    own = number[tokens]
    return (tokens - starts[own] + 0.5) / lengths[own].float()


NAMES = (
    "actor/entropy", "teacher/entropy", "val-topk/overlap_ratio",
    "rep/cosine_first", "rep/cosine_last",
)  # fmt: skip


@torch.no_grad()
def measure(
    sample: Sample,
    student: LMHead,
    teacher: LMHead | None,
    shared_ids: int | None,
    temperature: float,
) -> dict[str, list[float]]:
    """Return sum and count of each of `NAMES`; the count of what can't be measured is 0.

    Entropies are of the next token at the sampling temperature, in nats. The overlap is the share
    of the student's 16 most probable tokens that are among the teacher's. The cosines are of the
    final states in the first and the last fifth of each response. If heads are sharded, this is a
    collective operation.

    Args:
        student, teacher: the heads; the teacher's is None if it is not in memory, or has another
            vocabulary.
        shared_ids: the number of token ids that both have; None: all.
        temperature: the sampling temperature.
    """
    found = {name: [0.0, 0.0] for name in NAMES}

    def add(name: str, values: Tensor) -> None:
        found[name][0] += values.double().sum().item()
        found[name][1] += values.numel()

    ours, theirs = _Head(student, sample), None if teacher is None else _Head(teacher, sample)
    for start in range(0, len(sample.student), AT_ONCE):
        at = slice(start, start + AT_ONCE)
        log_p = ours.log_probs(sample.student[at], temperature)
        add("actor/entropy", _entropy(log_p))
        if sample.teacher is None or theirs is None:
            continue
        log_q = theirs.log_probs(sample.teacher[at], temperature, shared_ids)
        add("teacher/entropy", _entropy(log_q))
        k = min(TOP, log_p.shape[-1], log_q.shape[-1])
        top_p, top_q = (x.topk(k).indices for x in (log_p, log_q))
        add("val-topk/overlap_ratio", (top_p[:, :, None] == top_q[:, None]).sum((1, 2)) / k)
    if sample.is_logits or sample.teacher is None:
        return found
    if sample.student.shape == sample.teacher.shape:
        cosine = cosine_similarity(sample.student.float(), sample.teacher.float())
        add("rep/cosine_first", cosine[sample.place <= ENDS])
        add("rep/cosine_last", cosine[sample.place >= 1 - ENDS])
    return found


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


class _Head:
    """A head that is gathered if it is sharded, or none if there are logits already."""

    def __init__(self, head: LMHead, sample: Sample) -> None:
        self.head: LMHead | None = None
        if sample.is_logits:
            return
        weight, bias = (
            t.full_tensor() if isinstance(t, DTensor) else t for t in (head.weight, head.bias)
        )
        assert weight is not None
        self.head = LMHead(weight, bias, head.softcap, head.scale)
        self.operand = self.head.operand(weight)

    def log_probs(self, values: Tensor, temperature: float, width: int | None = None) -> Tensor:
        if self.head is not None:
            values = self.head.products(values.to(self.head.weight.dtype), self.operand)
            values = self.head.logits_(values)
        return (values[:, :width].float() / (temperature or 1.0)).log_softmax(-1)

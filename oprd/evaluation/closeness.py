"""How close a student is to a teacher on the student's own responses, without reference answers.

Shapes: B sequences of T tokens, M response tokens (rows), V vocabulary, d hidden width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oprd import distributed
from oprd.bridge.bank import Bridge
from oprd.bridge.project import Projectors, project_rows
from oprd.data.collate import collate
from oprd.data.rollout import Rollout
from oprd.distill.vocab_losses import VocabLoss
from oprd.distributed.fsdp import input_device
from oprd.models.decoder import Decoder, find_decoder, model_inputs, watch
from oprd.models.layer_pairs import pair_layers

CHUNK = 256
"""Rows whose logits are in float32 at once."""
MEANS = 7
"""Numbers that are summed over rows, beside the cosines."""


@dataclass(frozen=True)
class Closeness:
    """Means over response tokens, at the positions that predict them.

    Attributes:
        kl: KL(student || teacher), in nats, at temperature 1.
        kl_teacher: KL(teacher || student).
        overlap: share of the student's k most probable tokens that are among the teacher's k.
        entropy, teacher_entropy: of the next token, at the sampling temperature, in nats.
        perplexity, teacher_perplexity: of the responses, at temperature 1: how many tokens each
            model is in doubt between, exp(-mean log probability of the tokens that were sampled).
        layer_cosine: cosine of the hidden states by pair of layers, the first first; None if the
            widths differ and there is no bridge.
        cosine: its mean over layers.
        tokens, responses: numbers of both that were compared.
    """

    kl: float
    kl_teacher: float
    overlap: float
    entropy: float
    teacher_entropy: float
    perplexity: float
    teacher_perplexity: float
    layer_cosine: list[float] | None
    cosine: float | None
    tokens: int
    responses: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


class Comparer:
    """Compares a student with a teacher that has the same vocabulary."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        pad_id: int,
        temperature: float,
        k: int,
        bridge: Bridge | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """
        Args:
            temperature: of the entropies; 0 counts as 1.
            k: of the top-k overlap.
            bridge: projectors of the hidden states.
            vocabulary: number of tokens that both models have; tables may be padded beyond.

        Raises:
            ValueError: if the layers of the models can't be paired.
        """
        self.student, self.teacher, self.pad_id = student, teacher, pad_id
        self.temperature, self.k, self.vocabulary = temperature or 1.0, k, vocabulary
        self.decoders = find_decoder(student), find_decoder(teacher)
        ours, theirs = self.decoders
        self.projectors = None if bridge is None else Projectors(bridge)
        self.pairs: list[tuple[int, int]] = []
        if bridge is not None:
            self.pairs = list(bridge.info.pairs)
        elif ours.width == theirs.width:
            self.pairs = _pairs(ours.num_layers, theirs.num_layers)

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout], batch_size: int) -> Closeness:
        """Compare the models on this rank's rollouts, and average over all ranks. Collective."""
        sums = torch.zeros(1 + MEANS + len(self.pairs), dtype=torch.float64)
        for start in range(0, len(rollouts), batch_size):
            sums += self._sums(rollouts[start : start + batch_size])
        device = input_device(self.student)
        total, responses = distributed.sum_over_ranks([*sums.tolist()], device), len(rollouts)
        (count,) = distributed.sum_over_ranks([float(responses)], device)
        tokens = total[0]
        means = [x / tokens for x in total[1:]] if tokens else [0.0] * (len(total) - 1)
        cosines = means[MEANS:] if self.pairs else None
        return Closeness(
            kl=means[0],
            kl_teacher=means[1],
            overlap=means[2],
            entropy=means[3],
            teacher_entropy=means[4],
            perplexity=_exp(means[5]),
            teacher_perplexity=_exp(means[6]),
            layer_cosine=cosines,
            cosine=sum(cosines) / len(cosines) if cosines else None,
            tokens=int(tokens),
            responses=int(count),
        )

    def _sums(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return the number of rows, the sums of the `MEANS`, and those of the cosines."""
        device = input_device(self.student)
        batch = collate(rollouts, self.pad_id, device)
        # The state that predicts a token is that of the position before it.
        before_BT = torch.zeros_like(batch.response_mask)
        before_BT[:, :-1] = batch.response_mask[:, 1:]
        rows_M = before_BT.flatten().nonzero().squeeze(-1)
        inputs = model_inputs(batch.input_ids, batch.attention_mask)
        ours, theirs = self.decoders
        blocks = list(zip(*self.pairs, strict=True)) or [(), ()]
        s_MV, s_states = _run(self.student, ours, blocks[0], inputs, rows_M)
        t_MV, t_states = _run(self.teacher, theirs, blocks[1], inputs, rows_M)
        next_M = batch.input_ids.flatten()[rows_M + 1]
        sums = torch.zeros(MEANS, dtype=torch.float64)
        for at in torch.arange(len(rows_M), device=device).split(CHUNK):
            sums += self._vocabulary_sums(s_MV[at].float(), t_MV[at].float(), next_M[at])
        cosines = [
            self._cosine(s_states, t_states, pair).double().sum().cpu() for pair in self.pairs
        ]
        count = torch.tensor([float(len(rows_M))], dtype=torch.float64)
        return torch.cat([count, sums, torch.stack(cosines) if cosines else torch.zeros(0)])

    def _vocabulary_sums(self, student_MV: Tensor, teacher_MV: Tensor, next_M: Tensor) -> Tensor:
        # Before the tables are cut: a sampled token may lie beyond the shared vocabulary.
        surprises = [_surprise(student_MV, next_M), _surprise(teacher_MV, next_M)]
        width = min(student_MV.shape[-1], teacher_MV.shape[-1], self.vocabulary or 2**31)
        student_MV, teacher_MV = student_MV[:, :width], teacher_MV[:, :width]
        no_tokens = torch.zeros(len(student_MV), dtype=torch.long, device=student_MV.device)
        k = min(self.k, width)
        ours_Mk, theirs_Mk = student_MV.topk(k).indices, teacher_MV.topk(k).indices
        shared_M = (ours_Mk[:, :, None] == theirs_Mk[:, None, :]).any(-1).double().mean(-1)
        values = [
            VocabLoss("full").row_losses(student_MV, teacher_MV, no_tokens),
            VocabLoss("full_forward").row_losses(student_MV, teacher_MV, no_tokens),
            shared_M,
            _entropy(student_MV / self.temperature),
            _entropy(teacher_MV / self.temperature),
            *surprises,
        ]
        return torch.stack([v.double().sum() for v in values]).cpu()

    def _cosine(
        self, student: dict[int, Tensor], teacher: dict[int, Tensor], pair: tuple[int, int]
    ) -> Tensor:
        """Return the cosine (M,) of a pair of layers, of the projected states if bridged."""
        s_Md, t_Md = student[pair[0]], teacher[pair[1]]
        if self.projectors is not None:
            rows_M = torch.arange(len(s_Md), device=s_Md.device)
            s_Md = project_rows(s_Md, rows_M, self.projectors.student(pair[0], s_Md.device))
            t_Md = self.projectors.teacher(pair[0], t_Md, rows_M)
        return torch.cosine_similarity(s_Md.float(), t_Md.float().to(s_Md.device), dim=-1)


def _pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Return all pairs of layers; of a deeper student those that a teacher's layer has alone."""
    try:
        return pair_layers("all", student_layers, teacher_layers)
    except ValueError:
        return pair_layers("last", student_layers, teacher_layers)


def _entropy(logits_MV: Tensor) -> Tensor:
    log_p = logits_MV.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _surprise(logits_MV: Tensor, next_M: Tensor) -> Tensor:
    """Return minus the log probability (M,) of the tokens that follow; inf of those that the model
    does not have."""
    known_M = next_M < logits_MV.shape[-1]
    chosen_M = logits_MV.gather(-1, (next_M * known_M)[:, None]).squeeze(-1)
    return (logits_MV.logsumexp(-1) - chosen_M).masked_fill(~known_M, math.inf)


def _run(
    model: PreTrainedModel,
    decoder: Decoder,
    blocks: Sequence[int],
    inputs: dict[str, Tensor | None],
    rows_M: Tensor,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run a model; return its logits (M, V) and the states (M, d) of some blocks at the rows."""
    states: dict[int, Tensor] = {}

    def keep(block: int, h: Tensor) -> None:
        states[block] = h.flatten(0, -2)[rows_M]

    with watch(decoder, blocks, decoder.num_layers, keep):
        logits_BTV = model(**inputs, use_cache=False).logits
    return logits_BTV.flatten(0, 1)[rows_M], states


def spread(count: int, wanted: int) -> list[int]:
    """Return ``wanted`` indices below ``count``, evenly spread; all if there are fewer."""
    return sorted({i * count // min(wanted, count) for i in range(min(wanted, count))})

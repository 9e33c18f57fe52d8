"""Check of an engine's weights: do engine and student give a token the same probability?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oprd import distributed
from oprd.data.rollout import Rollout
from oprd.distributed.fsdp import reshard
from oprd.models.compile import eager_layers
from oprd.models.decoder import model_inputs


@dataclass(frozen=True)
class LogprobGap:
    """The differences |engine's log-prob - trainer's log-prob| over tokens of all ranks.

    Attributes:
        mean, max: mean and largest difference in nats.
        tokens: number of tokens compared.
    """

    mean: float
    max: float
    tokens: int

    @property
    def metrics(self) -> dict[str, float]:
        """Return the differences as metrics."""
        return {"rollout/logprob_gap": self.mean, "rollout/logprob_gap_max": self.max}


@torch.no_grad()
def logprob_gap(
    student: Any,
    rollouts: Sequence[Rollout],
    *,
    last: int,
    max_tokens: int,
    pad_id: int,
    device: torch.device,
) -> LogprobGap | None:
    """Compare the engine's log-probs in rollouts with the student's own, at temperature 1.

    Collective, with one forward pass on each rank. The last tokens of each response are compared,
    since they depend on all tokens before them. A token that the engine gave probability 0 has an
    infinite gap.

    Args:
        student: the student with the weights that the rollouts were sampled with.
        rollouts: rollouts of this rank; those without log-probs are skipped.
        last: number of last tokens to compare in each response, at most.
        max_tokens: size of the batch including padding, at most; further responses are left out.
        pad_id: id of any token.

    Returns:
        The gap, or None if no rank has a rollout to compare.
    """
    chosen: list[Rollout] = []
    for rollout in rollouts:
        longest = max(map(len, [*chosen, rollout]))
        if rollout.log_probs and (not chosen or longest * (len(chosen) + 1) <= max_tokens):
            chosen.append(rollout)
    differences = torch.zeros(0)
    # A rank with nothing to compare runs the student too, since its weights may be sharded.
    batch = chosen or [Rollout([pad_id], [pad_id], truncated=True)]
    ours = _log_probs(student, batch, last, pad_id, device)
    if chosen:
        theirs = [torch.tensor((r.log_probs or [])[-last:]) for r in chosen]
        differences = torch.cat([a.cpu() - b for a, b in zip(ours, theirs, strict=True)]).abs()
    differences = differences.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
    total, count = distributed.sum_over_ranks([differences.sum().item(), len(differences)], device)
    highest = max(differences.tolist(), default=0.0)
    highest = distributed.max_over_ranks(highest, device)
    return LogprobGap(total / count, highest, int(count)) if count else None


def _log_probs(
    student: Any, rollouts: Sequence[Rollout], last: int, pad_id: int, device: torch.device
) -> list[Tensor]:
    """Compute the student's log-probs of each response's last tokens.

    The batch is padded on the left, so that these tokens are in the same columns and the LM head
    computes the logits of those columns only.
    """
    length = max(map(len, rollouts))
    ids = torch.full((len(rollouts), length), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for i, rollout in enumerate(rollouts):
        ids[i, length - len(rollout) :] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        attention[i, length - len(rollout) :] = 1
    ids, attention = ids.to(device), attention.to(device)
    counts = [min(last, len(r.response_ids)) for r in rollouts]
    was_training = student.training
    student.eval()
    with eager_layers(student):
        inputs = model_inputs(ids, attention)
        logits = student(**inputs, use_cache=False, logits_to_keep=max(counts) + 1).logits
    reshard(student)
    student.train(was_training)
    log_probs = logits[:, :-1].float().log_softmax(-1)
    token_log_probs = log_probs.gather(-1, ids[:, -max(counts) :, None])[..., 0]
    return [row[len(row) - n :] for row, n in zip(token_log_probs, counts, strict=True)]

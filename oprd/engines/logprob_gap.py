"""Whether an engine samples from the student's present weights: do both give a token the same
probability?"""

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
    """|log-prob by the engine - log-prob by the trainer| over tokens of all ranks.

    Attributes:
        mean, max: in nats.
        tokens: compared.
    """

    mean: float
    max: float
    tokens: int

    @property
    def metrics(self) -> dict[str, float]:
        """Under their names in the log."""
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
    """Compare the log-probs that came with rollouts to the student's own, at temperature 1.

    Collective, with one forward pass on each rank. A response's last tokens depend on all that is
    before them, so those are compared. A token that the engine gave probability 0 has an infinite
    gap.

    Args:
        student: as it was when they were sampled.
        rollouts: this rank's; those without log-probs are passed over.
        last: tokens of each response, at most.
        max_tokens: of the batch, padding included; responses beyond it are left out.
        pad_id: any token.

    Returns:
        None if no rank has anything to compare.
    """
    chosen: list[Rollout] = []
    for rollout in rollouts:
        longest = max(map(len, [*chosen, rollout]))
        if rollout.log_probs and (not chosen or longest * (len(chosen) + 1) <= max_tokens):
            chosen.append(rollout)
    differences = torch.zeros(0)
    # A rank with nothing to compare runs the student too: its weights may be sharded.
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
    """Of each response's last tokens. Padded on the left, so that they are the same columns and the
    logits of those are all that the LM head makes."""
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
    of_tokens = log_probs.gather(-1, ids[:, -max(counts) :, None])[..., 0]
    return [row[len(row) - n :] for row, n in zip(of_tokens, counts, strict=True)]

"""The micro-batches of a training step, shared out over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from oprd import distributed
from oprd.config import TrainConfig
from oprd.data.collate import Batch, collate
from oprd.data.micro_batches import Plan, attention_share, plan
from oprd.data.rollout import Rollout
from oprd.distill.objectives import Chosen, Objectives
from oprd.training.metrics import plan_metrics


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts that go through the models at once.

    Attributes:
        teacher: name of the teacher of these rollouts.
        chosen: the supervised tokens.
    """

    teacher: str
    batch: Batch
    chosen: Chosen


@dataclass(frozen=True)
class GlobalBatch:
    """A step's rollouts as micro-batches.

    Attributes:
        micro_batches: this rank's.
        totals: by objective, the denominator of its mean over the global batch, so that no split of
            it changes the loss.
        metrics: how evenly the work is shared out.
    """

    micro_batches: list[MicroBatch]
    totals: dict[str, float]
    metrics: dict[str, float]


def global_batch(
    rollouts: list[Rollout],
    objectives: Objectives,
    cfg: TrainConfig,
    pad_id: int,
    teacher_tokenizers: Mapping[str, PreTrainedTokenizerBase],
    device: torch.device,
) -> GlobalBatch:
    """Share the rollouts of all ranks out over them, by teacher. Collective.

    Args:
        rollouts: this rank's.
        teacher_tokenizers: by teacher, of those whose tokenizer is not the student's.
    """
    gathered, share = distributed.gather(rollouts), attention_share(objectives.decoder)
    micro_batches: list[MicroBatch] = []
    plans: list[Plan] = []
    for name in objectives.teachers:
        own = [r for r in gathered if name in ("", r.source)]
        plans.append(
            plan(own, distributed.world_size(), cfg.micro_batch_tokens, cfg.packing, share)
        )
        theirs = teacher_tokenizers.get(name)
        teacher_pad_id = None if theirs is None else theirs.pad_token_id
        for part in plans[-1][distributed.rank()]:
            batch = collate(part, pad_id, device, teacher_pad_id, cfg.packing)
            micro_batches.append(MicroBatch(name, batch, objectives.supervise(batch)))
    totals = objectives.totals([m.chosen for m in micro_batches], device)
    return GlobalBatch(micro_batches, totals, plan_metrics(plans, cfg.packing, share))

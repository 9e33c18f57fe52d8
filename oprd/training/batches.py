"""Distribution of a training step's rollouts over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from oprd import distributed
from oprd.config import TrainConfig
from oprd.data.collate import Batch, collate
from oprd.data.micro_batches import Assignment, assign, attention_share
from oprd.data.rollout import Rollout
from oprd.distill.objectives import Chosen, Objectives
from oprd.training.metrics import plan_metrics


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts that go through the models in one forward pass.

    Attributes:
        teacher: name of the teacher for these rollouts.
        batch: the rollouts as tensors.
        chosen: the supervised tokens.
    """

    teacher: str
    batch: Batch
    chosen: Chosen


@dataclass(frozen=True)
class GlobalBatch:
    """A step's rollouts as micro-batches.

    Attributes:
        micro_batches: this rank's micro-batches.
        totals: for each objective, the denominator of its mean over the global batch. With it the
            loss does not depend on how the batch is split.
        metrics: padding ratio and imbalance of the work between ranks, and the numbers of ranks and
            of a rank's micro-batches.
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
    """Gather the rollouts of all ranks and divide them into micro-batches, one teacher at a time.

    This is a collective operation: every rank must call it.

    Args:
        rollouts: this rank's rollouts.
        pad_id: the student's padding token.
        teacher_tokenizers: by teacher name, only for teachers with another tokenizer than the
            student's.
    """
    gathered, share = distributed.gather(rollouts), attention_share(objectives.decoder)
    micro_batches: list[MicroBatch] = []
    plans: list[Assignment] = []
    for name in objectives.teachers:
        own = [r for r in gathered if name in ("", r.source)]
        plans.append(
            assign(own, distributed.world_size(), cfg.micro_batch_tokens, cfg.packing, share)
        )
        theirs = teacher_tokenizers.get(name)
        teacher_pad_id = None if theirs is None else theirs.pad_token_id
        for part in plans[-1][distributed.rank()]:
            # Tokens are selected on the CPU: on a GPU, their number would have to be waited for.
            batch = collate(part, pad_id, "cpu", teacher_pad_id, cfg.packing)
            chosen = objectives.supervise(batch).to(device)
            micro_batches.append(MicroBatch(name, batch.to(device), chosen))
    totals = objectives.totals([m.chosen for m in micro_batches], device)
    metrics = plan_metrics(plans, cfg.packing, share)
    metrics |= {
        "perf/ranks": distributed.world_size(),
        "perf/micro_batches": len(micro_batches),
    }
    return GlobalBatch(micro_batches, totals, metrics)

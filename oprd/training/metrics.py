"""Metrics of a training step, reduced over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from oprd import distributed
from oprd.data.micro_batches import Assignment, batch_work
from oprd.distill.objectives import StudentPass
from oprd.distill.taps import RepOutput
from oprd.models.decoder import Decoder
from oprd.observability.memory import GIB, PeakMemory

METRICS = {"oprd": "actor/rep_loss", "opd_top1": "actor/pg_loss"}


def reduced_losses(
    outputs: Sequence[StudentPass], device: torch.device
) -> tuple[dict[str, float], list[float]]:
    """Sum the losses over micro-batches and ranks. Collective: every rank must call it.

    Args:
        outputs: the student passes of this rank's micro-batches.

    Returns:
        Each objective's loss over the global batch, before weighting, and the representation loss
        of each compared layer.
    """
    names = list(outputs[0].parts)
    local = torch.stack([torch.stack([*out.parts.values()]) for out in outputs]).double().sum(0)
    values = local.tolist()
    if outputs[0].rep is not None:
        reps = torch.stack([out.rep.layer_losses for out in outputs if out.rep])
        values += reps.double().sum(0).tolist()
    values = distributed.sum_over_ranks(values, device)
    return dict(zip(names, values[: len(names)], strict=True)), values[len(names) :]


def loss_metrics(losses: Mapping[str, float]) -> dict[str, float]:
    """Return the objectives' losses under their metric names."""
    return {METRICS.get(name, f"actor/{name}_loss"): loss for name, loss in losses.items()}


def time_metrics(seconds: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Return the seconds of each phase of a step, and the sampled tokens a second."""
    metrics = {"perf/tokens_per_second": tokens / max(sum(seconds.values()), 1e-9)}
    return metrics | {f"time/{phase.replace(' ', '_')}_s": s for phase, s in seconds.items()}


def rep_metrics(
    outputs: Sequence[RepOutput], layer_losses: list[float], width: int, device: torch.device
) -> dict[str, Any]:
    """Return the metrics of the representation loss.

    Args:
        outputs: the outputs of this rank's micro-batches.
        layer_losses: each layer's loss over the global batch.
        width: D, the width that `nmse` divides by.
    """
    rows = []
    for out in outputs:  # all in one tensor, which is waited for once
        norms = (out.layer_student_norm, out.layer_teacher_norm)
        means = [x.mean().double() for x in (out.layer_cosine, *norms)]
        one = torch.ones_like(means[0])  # which counts the tokens
        row = torch.cat([torch.stack([one, *means]), out.layer_cosine.double()])
        rows.append(row * out.num_valid)
    count, *sums = distributed.sum_over_ranks(torch.stack(rows).sum(0).tolist(), device)
    cosine, norm_s, norm_t, *by_layer = (x / count if count else 0.0 for x in sums)
    return {
        "rep/cosine_similarity": cosine,
        "rep/layer_cosine": by_layer,
        "rep/norm_mse": 2 * (1 - cosine) / width if count else 0.0,
        "rep/student_norm": norm_s,
        "rep/teacher_norm": norm_t,
        "rep/layer_loss": layer_losses,
        "rep/supervised_tokens": int(count),
    }


def sample_metrics(found: Mapping[str, Sequence[float]], device: torch.device) -> dict[str, float]:
    """Return the means over all ranks' samples. Collective.

    Args:
        found: the sum and count of each metric, from `oprd.distill.diagnostics.measure`. Metrics
            with the count 0 on all ranks are left out.
    """
    values = [value for pair in found.values() for value in pair]
    reduced = distributed.sum_over_ranks(values, device)
    pairs = zip(found, reduced[::2], reduced[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}


def gradient_norms(student: nn.Module, decoder: Decoder) -> dict[str, float]:
    """Return the norms of the gradients of parts of a student, before clipping. Collective.

    The parts are the embeddings, each third of the blocks, and the rest (final norm and head).
    """
    number = decoder.num_layers
    thirds = sorted({0, number // 3, 2 * number // 3, number})
    parts = {"embeddings": list(decoder.backbone.get_input_embeddings().parameters())}
    for first, end in itertools.pairwise(thirds):
        parts[f"blocks_{first}-{end - 1}"] = list(decoder.layers[first:end].parameters())
    known = {id(p) for group in parts.values() for p in group}
    parts["rest"] = [p for p in student.parameters() if id(p) not in known]
    norms = {}
    for name, parameters in parts.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
            norms[f"actor/grad_norm/{name}"] = whole.item()
    return norms


def plan_metrics(plans: Sequence[Assignment], packed: bool, share: float) -> dict[str, float]:
    """Return how well a step's plans use the ranks.

    ``perf/padding_ratio`` is the share of padding in the tokens that the student reads.
    ``perf/rank_imbalance`` is the largest work of a rank in each round of micro-batches, summed
    over rounds, divided by the sum of the mean work; 1 is the best.

    Args:
        plans: one plan for each teacher, for all ranks.
        packed: whether sequences are packed without padding.
        share: see `oprd.data.micro_batches.attention_share`.
    """
    batches = [batch for planned in plans for rank in planned for batch in rank]
    tokens = sum(len(r) for batch in batches for r in batch)
    read = tokens
    if not packed:
        read = sum(len(batch) * max(map(len, batch), default=0) for batch in batches)
    rounds = [
        [batch_work(batch, packed, share) for batch in together]
        for planned in plans
        for together in zip(*planned, strict=True)
    ]
    waited, equal = sum(map(max, rounds)), sum(sum(works) / len(works) for works in rounds)
    return {"perf/padding_ratio": 1 - tokens / read, "perf/rank_imbalance": waited / equal}


def memory_metrics(peaks: Sequence[PeakMemory], device: torch.device) -> dict[str, float]:
    """Return the peak memory of a student update in GiB, and its increase over the start.

    Both are the maximum over ranks. Empty where peak memory can't be measured.
    """
    start = peaks[0].start
    highest = [p.peak for p in peaks if p.peak is not None]
    if start is None or not highest:
        return {}
    metrics = {
        "mem/actor_update_peak_alloc_GB": max(highest) / GIB,
        "mem/actor_update_delta_peak_GB": max(max(highest) - start, 0) / GIB,
    }
    reserved = [p.reserved for p in peaks if p.reserved is not None]
    if reserved:
        metrics["mem/actor_update_peak_reserved_GB"] = max(reserved) / GIB
    return {name: distributed.max_over_ranks(value, device) for name, value in metrics.items()}

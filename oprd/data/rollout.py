"""Rollouts: responses that the student samples, and the tokens that a teacher reads for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oprd import distributed
from oprd.data.prompts import Prompt
from oprd.tokenizers.alignment import Aligner, Reading


@dataclass(frozen=True)
class Rollout:
    """A prompt and one response, as token ids.

    Attributes:
        prompt_ids: the prompt.
        response_ids: the response, including EOS if it was reached.
        truncated: True if the response was cut at max_new_tokens, before EOS.
        source: the prompt's source, which determines the teacher.
        reading: the tokens that the teacher reads. None: ``prompt_ids`` and ``response_ids``.
        log_probs: log-probabilities of the response tokens at temperature 1, from the engine that
            sampled them. None: they were not requested.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool
    source: str = ""
    reading: Reading | None = None
    log_probs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def longest(self) -> int:
        """Number of tokens in the longer of the two models' inputs."""
        return max(len(self), len(self.reading or ()))


def for_teacher(
    rollout: Rollout, prompt: Prompt, aligners: Mapping[str, Aligner], ends: Sequence[int]
) -> Rollout:
    """Return the rollout with its prompt's source and the teacher's reading filled in.

    Args:
        rollout: a rollout of ``prompt``.
        prompt: its prompt.
        aligners: aligners for teachers with other tokenizers, by source ("": for every source).
        ends: tokens that end the student's responses.
    """
    reading = None
    aligner = aligners.get(prompt.source, aligners.get(""))
    if prompt.teacher_ids is not None and aligner is not None:
        reading = aligner(
            rollout.response_ids,
            prompt.teacher_ids,
            student_end_ids=ends,
            teacher_end_id=prompt.teacher_end_id,
        )
    elif prompt.teacher_ids is not None:
        reading = Reading(prompt.teacher_ids, rollout.response_ids)
    return replace(rollout, source=prompt.source, reading=reading)


def rollout_metrics(
    rollouts: Sequence[Rollout], device: torch.device, aligned: bool
) -> dict[str, Any]:
    """Compute metrics of the rollouts of all ranks. Collective.

    Args:
        rollouts: this rank's rollouts.
        device: device of the collectives.
        aligned: True if a teacher has another tokenizer.

    Returns:
        ``response_length/*``, of which ``empty_ratio`` is the share of responses that end at their
        first token; ``rollout/tokens``, the number of tokens including prompts; and, if
        ``aligned``, ``align/ratio``: the share of response tokens that are paired with a teacher
        token, over the rollouts whose teacher has another tokenizer (1 if there are none).
    """
    lengths = [len(r.response_ids) for r in rollouts]
    readings = [(r.reading, n) for r, n in zip(rollouts, lengths, strict=True)]
    paired = [(len(g.pairs), n) for g, n in readings if g is not None and g.pairs is not None]
    sums = [sum(lengths), len(lengths), sum(r.truncated for r in rollouts)]
    sums += [sum(len(r) for r in rollouts), sum(p for p, _ in paired), sum(n for _, n in paired)]
    sums.append(sum(n <= 1 and not r.truncated for r, n in zip(rollouts, lengths, strict=True)))
    length, responses, truncated, tokens, pairs, pairable, empty = distributed.sum_over_ranks(
        sums, device
    )
    metrics = {
        "response_length/mean": length / responses,
        "response_length/max": distributed.max_over_ranks(float(max(lengths, default=0)), device),
        "response_length/clip_ratio": truncated / responses,
        "response_length/empty_ratio": empty / responses,
        "rollout/tokens": int(tokens),
    }
    if aligned:
        metrics["align/ratio"] = pairs / pairable if pairable else 1.0
    return metrics

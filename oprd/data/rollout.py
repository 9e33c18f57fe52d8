"""Rollouts: the responses that the student samples, and what a teacher reads of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from oprd.data.prompts import Prompt
from oprd.tokenizers.alignment import Aligner, Reading


@dataclass(frozen=True)
class Rollout:
    """A prompt and one response: token ids, EOS included if it was reached.

    Attributes:
        truncated: cut at max_new_tokens, before EOS.
        source: of the prompt, which decides on the teacher.
        reading: what that teacher reads; None: the same.
        log_probs: of its tokens at temperature 1, as the engine that sampled them has them; None:
            it was not asked.
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
        """Tokens of the longer of the two models' inputs."""
        return max(len(self), len(self.reading or ()))


def for_teacher(
    rollout: Rollout, prompt: Prompt, aligners: Mapping[str, Aligner], ends: Sequence[int]
) -> Rollout:
    """The rollout with its prompt's source, and what the teacher reads.

    Args:
        aligners: by source (or "", for every source), of teachers with other tokenizers.
        ends: tokens that end the student's responses.
    """
    reading = None
    aligner = aligners.get(prompt.source, aligners.get(""))
    if prompt.teacher_ids is not None and aligner is not None:
        reading = aligner(
            rollout.response_ids, prompt.teacher_ids,
            student_end_ids=ends, teacher_end_id=prompt.teacher_end_id,
        )  # fmt: skip
    elif prompt.teacher_ids is not None:
        reading = Reading(prompt.teacher_ids, rollout.response_ids)
    return replace(rollout, source=prompt.source, reading=reading)

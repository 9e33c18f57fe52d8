"""The error that float8 makes in a teacher's states, on a run's own prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oprd.data.prompts import Prompt
from oprd.models.decoder import find_decoder
from oprd.models.float8 import Distance, States, describe, to_float8

PROMPTS = 4
TOKENS = 1024
"""At most so many tokens of each prompt are read."""


def measured_float8(
    student: Any | None,
    teacher: Any,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[int, int]],
    source: str = "",
) -> list[str]:
    """Let a teacher compute in float8, in place, and measure the error on a few prompts.

    Args:
        student: compared too, if both models read the same tokens and have the same width; None:
            it is not.
        teacher: in the dtype that it was loaded in, on its device.
        prompts: the run's prompts.
        pairs: the compared (student block, teacher block).
        source: the source of the prompts that are this teacher's; empty: all are.

    Returns:
        Lines for the run's log, see `oprd.models.float8.describe`.
    """
    own = [p for p in prompts if not source or p.source == source][:PROMPTS]
    ids = [(p.teacher_ids or p.token_ids)[:TOKENS] for p in own]
    blocks = sorted({block for _, block in pairs})
    before = States.of(teacher, ids, blocks)
    to_student = None
    if student is not None and _comparable(student, teacher, own):
        ours = States.of(student, ids, sorted({block for block, _ in pairs}))
        to_student = Distance.between(ours, before, pairs)
    to_float8(teacher)
    after = States.of(teacher, ids, blocks)
    return describe(Distance.between(after, before, [(b, b) for b in blocks]), to_student)


def _comparable(student: Any, teacher: Any, prompts: Sequence[Prompt]) -> bool:
    """Return whether the two models' states have one width and stand at the same tokens."""
    widths = {find_decoder(model).width for model in (student, teacher)}
    return len(widths) == 1 and all(prompt.teacher_ids is None for prompt in prompts)

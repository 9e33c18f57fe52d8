"""Defaults of a run that depend on its device and its models."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PretrainedConfig

from oprd.config import (
    DataConfig,
    DType,
    EvalConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
)
from oprd.models.compatibility import positions_of


def choose_dtypes(
    student: StudentConfig, teachers: Iterable[TeacherConfig], on_gpu: bool, trains: bool = True
) -> None:
    """Replace ``auto`` by a dtype, in place.

    On a GPU, weights are bfloat16, but those that are trained float32.

    Args:
        trains: False if the student is only read.
    """
    narrow: DType = "bfloat16" if on_gpu else "float32"
    if student.dtype == "auto":
        student.dtype = "float32" if trains and student.lora.rank is None else narrow
    for teacher in teachers:
        if teacher.dtype == "auto":
            teacher.dtype = student.dtype if teacher.is_self else narrow


def choose_lengths(
    data: DataConfig,
    rollout: RolloutConfig,
    evaluation: EvalConfig | None,
    models: Iterable[tuple[PretrainedConfig | None, int | None]],
) -> list[str]:
    """Lower the default lengths of prompts and responses to what the models' contexts leave.

    Lengths that differ from the defaults are the user's, and left alone.

    Args:
        evaluation: lowered too; None: there is none.
        models: configurations, None if unknown, with the ``context_length`` option.

    Returns:
        Notes for the user.
    """
    limits = [given or positions_of(config.get_text_config()) for config, given in models if config]
    context = min((limit for limit in limits if limit is not None), default=None)
    if context is None:
        return []
    notes = []
    default = DataConfig.max_prompt_tokens
    if data.max_prompt_tokens == default and 2 * default > context:
        data.max_prompt_tokens = max(1, context // 2)
        notes.append(
            f"data.max_prompt_tokens={data.max_prompt_tokens}: half of the models' context of "
            f"{context} tokens"
        )
    left = context - data.max_prompt_tokens
    for name, section in (("rollout", rollout), ("eval", evaluation)):
        if section is None or section.max_new_tokens != RolloutConfig.max_new_tokens:
            continue
        if 0 < left < section.max_new_tokens:
            section.max_new_tokens = left
            notes.append(
                f"{name}.max_new_tokens={left}: what the models' context of {context} tokens leaves"
            )
    return notes

"""Saving the student so that `from_pretrained` loads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.lora import adapter_weights, is_adapted, save_adapter
from oprd.student_weights import full_weights


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write model and tokenizer in Hugging Face's layout.

    A LoRA student is merged, so that it loads like any other; its adapter goes into ``adapter/``.
    Into a directory beside it first, and then renamed: ``directory`` is whole or not there.
    """
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    adapted = is_adapted(student)
    student.save_pretrained(unfinished, state_dict=dict(full_weights(student)) if adapted else None)
    if adapted:
        save_adapter(student, adapter_weights(student), unfinished / "adapter")
    tokenizer.save_pretrained(unfinished)
    if directory.exists():
        shutil.rmtree(directory)
    unfinished.rename(directory)

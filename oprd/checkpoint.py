"""Saving the student so that `from_pretrained` loads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write model and tokenizer in Hugging Face's layout.

    Into a directory beside it first, and then renamed: ``directory`` is whole or not there.
    """
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if directory.exists():
        shutil.rmtree(directory)
    unfinished.rename(directory)

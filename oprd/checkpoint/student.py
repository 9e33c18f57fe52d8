"""Export of the student to a directory that `from_pretrained` loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd import distributed
from oprd.atomic_files import sync, sync_tree
from oprd.models.lora import adapter_weights, is_adapted, save_adapter
from oprd.models.weights import full_weights


def save_student(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write model and tokenizer in Hugging Face's layout; collective, rank 0 writes.

    A LoRA student is merged, so that it loads like any other; its adapter goes into ``adapter/``.
    The files go to a temporary directory, which is then renamed, so that ``directory`` is never
    half-written. Rank 0 meanwhile holds one full copy of the weights in main memory.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in full_weights(student):
        if distributed.rank() == 0:
            weights[name] = tensor.cpu()
    adapter = adapter_weights(student) if is_adapted(student) else None
    if distributed.rank() != 0:
        return
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    # The names are those of files already; changed once more, some families' would be others.
    student.save_pretrained(unfinished, state_dict=weights, save_original_format=False)
    if adapter is not None:
        save_adapter(student, adapter, unfinished / "adapter")
    tokenizer.save_pretrained(unfinished)
    sync_tree(unfinished)
    if directory.exists():
        shutil.rmtree(directory)
    unfinished.rename(directory)
    sync(directory.parent)

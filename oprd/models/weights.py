"""The student's weights as Hugging Face names them, whole, one at a time: for engines that sample
from it, and for files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from oprd.models.lora import merged_weights


def full_weights(student: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of everything that ``save_pretrained`` would write.

    Sharded tensors are gathered as they are asked for, so that at no time more than one of them is
    whole. That is collective: every rank must go through all of it. A head that is tied to the
    embeddings comes once, under the name of the embeddings. A LoRA adapter is merged.
    """
    for name, tensor in merged_weights(student):
        whole = tensor.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        # Under its names in files: experts that the model keeps as one tensor come one by one.
        yield from revert_weight_conversion(student, {name: whole}).items()

"""The student's full weights under Hugging Face's names, for sampling engines and for files."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from oprd.models.lora import merged_weights


def full_weights(student: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full tensor of all weights that ``save_pretrained`` would write.

    Sharded tensors are gathered one at a time, so that at most one full tensor exists. Gathering is
    a collective operation: every rank must exhaust this iterator. A head that is tied to the
    embeddings is yielded once, under the name of the embeddings. A LoRA adapter is merged.
    """
    for name, tensor in merged_weights(student):
        whole = tensor.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        # Names in files differ: experts that the model keeps as one tensor are separate in files.
        yield from revert_weight_conversion(student, {name: whole}).items()

"""The student's full weights under Hugging Face's names, for sampling engines and for files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from oprd.models.lora import merged_weights, plain_names

Group = Callable[[str], str]


def full_weights(student: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full tensor of all weights that ``save_pretrained`` would write.

    Sharded tensors are gathered one at a time, so that at most one full tensor exists; those of a
    block together, for the few families whose files join several tensors of the model. Gathering is
    a collective operation: every rank must exhaust this iterator. A head that is tied to the
    embeddings is yielded once, under the name of the embeddings. A LoRA adapter is merged.
    """
    group = _groups(student)
    for _, together in groupby(merged_weights(student), key=lambda item: group(item[0])):
        whole = {name: _gathered(tensor.detach()) for name, tensor in together}
        # Names in files differ: experts that the model keeps as one tensor are separate in files.
        yield from revert_weight_conversion(student, whole).items()


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tensor(name: str) -> str:
    return name


def _block(name: str) -> str:
    """Return the name up to the first number, the block's."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


def _everything(_name: str) -> str:
    return ""


_known: WeakKeyDictionary[nn.Module, Group] = WeakKeyDictionary()


def _groups(student: PreTrainedModel) -> Group:
    """Return which weights must be converted together to get what all of them together give."""
    if student not in _known:
        shapes = plain_names(student)
        whole = _converted(student, shapes, _everything)
        _known[student] = next(
            group
            for group in (_tensor, _block, _everything)
            if _converted(student, shapes, group) == whole
        )
    return _known[student]


def _converted(
    student: PreTrainedModel, shapes: Mapping[str, torch.Size], group: Group
) -> dict[str, torch.Size]:
    """Return names and shapes in files; tensors without memory are converted."""
    found: dict[str, Tensor] = {}
    for _, together in groupby(shapes.items(), key=lambda item: group(item[0])):
        empty = {name: torch.empty(shape, device="meta") for name, shape in together}
        try:
            found |= revert_weight_conversion(student, empty)
        except (KeyError, RuntimeError, TypeError, ValueError):  # it needs others
            return {}
    return {name: tensor.shape for name, tensor in found.items()}

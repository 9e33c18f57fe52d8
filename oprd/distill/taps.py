"""Taps in a student's decoder layers, which add the gradient of the loss during backward.

Shapes: L compared layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oprd.models.decoder import first_tensor, replace_first
from oprd_kernels import RepLossStats, rep_tap


@dataclass(frozen=True)
class RepOutput:
    """The representation loss of a student forward pass, and its statistics.

    Attributes:
        loss: 0-D, the mean of the layers' losses; call ``backward`` on it.
        layer_losses: (L,) float32, each layer's loss, detached.
        layer_cosine: (L,) float32, mean cosine between student and teacher rows.
        layer_student_norm, layer_teacher_norm: (L,) float32, mean norms of the rows.
        num_valid: 0-D, the number of rows whose weight is not 0.
    """

    loss: Tensor
    layer_losses: Tensor
    layer_cosine: Tensor
    layer_student_norm: Tensor
    layer_teacher_norm: Tensor
    num_valid: Tensor


@dataclass
class TapSession:
    """One student forward pass: the teacher's states, and the results of the taps."""

    teacher_states: Sequence[Tensor]
    options: dict
    student_proj: Callable[[int, torch.device], Tensor] | None = None
    """With a bridge: returns P_S (r, dS) of the index-th compared layer."""
    num_tokens: int | None = None
    """B * T, the number of rows that the student's states must have; None: not checked."""
    found: dict[int, tuple[Tensor, RepLossStats]] = field(default_factory=dict)

    def tap(self, index: int, h: Tensor) -> Tensor:
        """Pass the states of the index-th compared layer through `rep_tap`.

        Raises:
            RuntimeError: if the layer has been passed already.
            ValueError: if the states have not ``num_tokens`` rows.
        """
        if index in self.found:
            raise RuntimeError(
                "the student ran twice inside one `taps` context: open one per forward pass"
            )
        if self.num_tokens is not None and h.shape[:-1].numel() != self.num_tokens:
            raise ValueError(
                f"the student's states have shape {tuple(h.shape)} for a batch of "
                f"{self.num_tokens} tokens: something between the call and the blocks changes the "
                "batch. Prompt tuning adds tokens (use LoRA), DataParallel splits the batch (use "
                "one process per GPU)"
            )
        proj = None if self.student_proj is None else self.student_proj(index, h.device)
        h, loss, stats = rep_tap(
            h, self.teacher_states[index], student_proj=proj, **self.options, return_stats=True
        )
        self.found[index] = (loss, stats)
        return h

    def output(self) -> RepOutput:
        """Return loss and statistics of the layers.

        Raises:
            RuntimeError: if the student has not run through all compared layers.
        """
        if len(self.found) < len(self.teacher_states):
            raise RuntimeError(
                f"{len(self.found)} of {len(self.teacher_states)} taps were reached: run the "
                "student forward inside the `taps` context before asking for its output"
            )
        in_order = [self.found[i] for i in range(len(self.found))]
        losses = torch.stack([loss for loss, _ in in_order])
        return RepOutput(
            loss=losses.mean(),
            layer_losses=losses.detach(),
            layer_cosine=torch.stack([stats.cosine for _, stats in in_order]),
            layer_student_norm=torch.stack([stats.student_norm for _, stats in in_order]),
            layer_teacher_norm=torch.stack([stats.teacher_norm for _, stats in in_order]),
            num_valid=in_order[0][1].num_valid,
        )


class Board:
    """Holds the current session for the taps of one student."""

    session: TapSession | None = None


def tapped_class(cls: Any) -> Any:
    """Return a subclass of a block's class whose ``__call__`` passes the output through a tap.

    A forward hook would not do: before transformers 5.20, gradient checkpointing recomputes a
    block's whole call in backward, hooks included, with the session that is current then. A tap
    outside the call runs once in every version, also under reentrant checkpointing.
    """

    def __call__(self, *args, **kwargs):
        output = super(tapped, self).__call__(*args, **kwargs)
        point = self.__dict__.get("_oprd_tap")
        if point is None or point[0].session is None:
            return output
        board, index = point
        return replace_first(output, board.session.tap(index, first_tensor(output)))

    tapped: Any = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})
    tapped.__qualname__ = cls.__qualname__
    tapped._oprd_original = cls
    return tapped


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, torch.compile and their like."""
    while not hasattr(model, "get_decoder"):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


@contextmanager
def without_head(model: Any, session: TapSession) -> Iterator[None]:
    """Within this context, the model's own call leaves its LM head out.

    The logits it returns are (B, T, 1) and hold the loss of ``session``, the only thing that is
    then used of the call. Their graph is the loss's, by which DistributedDataParallel with
    ``find_unused_parameters`` finds the parameters that will get no gradient.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return

    def stand_in(states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return session.output().loss.expand(*states.shape[:-1], 1)

    own = head.__dict__.get("forward")  # accelerate and others set it on the instance
    head.forward = stand_in
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own

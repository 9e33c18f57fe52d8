"""What a fused backend is to the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name that cannot run here, or not this call."""


class Backend(Protocol):
    """Kernels for calls that `oprd_kernels.validate` has accepted.

    ``saved`` is a float32 buffer that begins with the batch statistics (`layout.STATS` floats) and
    is otherwise the backend's own: it comes back in `GradCall`.
    """

    @property
    def name(self) -> str:
        """As in `oprd_kernels.BACKENDS`."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why no kernel of this backend can run on tensors of ``device``; None if it can."""

    def unsupported(self, call: LossCall) -> str | None:
        """Why this backend can't do a call that others can; None if it can."""

    def saved_size(self, call: LossCall) -> int:
        """Floats in ``saved``. Shapes and dtypes alone are looked at, the former perhaps symbolic:
        the ops' fake kernels ask as well."""

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and ``saved``.

        ``grad``, if given, receives the gradient of the reduced loss with respect to
        ``call.student``; it may be ``call.teacher`` itself.
        """

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """Writes (or adds) the gradient of the loss into the supervised rows of ``grad``.

        ``grad`` has the student's shape; other rows are not touched. ``grad_loss`` is a float32
        scalar, or (M,) for reduction "none".
        """

    def grad_proj(self, call: GradCall, grad_loss: Tensor) -> Tensor:
        """(r, dS): the gradient with respect to student_proj; ``call.student`` is there."""

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """(L,) losses, and each layer's ``saved`` in a row of a matrix as wide as the largest. The
        calls differ in their states and projectors only; reduction "none" is not among them."""

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """Writes the gradients of sum_l grad_losses[l] * loss[l] with respect to the students."""

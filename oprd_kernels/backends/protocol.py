"""The interface of a fused backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from oprd_kernels.call import GradCall, LossCall


class BackendUnavailable(RuntimeError):
    """Raised if a backend requested by name can't run on this machine or can't do the call."""


class Backend(Protocol):
    """The kernels for calls that `oprd_kernels.validate` has accepted.

    ``saved`` is a float32 buffer that begins with the batch statistics (`saved_buffer.STATS`
    floats). The backend defines the rest, and gets the buffer back in `GradCall`.
    """

    @property
    def name(self) -> str:
        """The name in `oprd_kernels.BACKENDS`."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why this backend can't run on ``device``, or None if it can."""

    def unsupported(self, call: LossCall) -> str | None:
        """Return why this backend does not support ``call``, or None if it does."""

    def saved_size(self, call: LossCall) -> int:
        """Return the number of floats in ``saved``.

        The result may depend on shapes and dtypes only. Shapes may be symbolic, because the fake
        kernels of the ops call this method too.
        """

    def forward(self, call: LossCall, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and ``saved``.

        ``grad``, if given, receives the gradient of the reduced loss with respect to
        ``call.student``. It may be ``call.teacher`` itself.
        """

    def backward_(self, call: GradCall, grad: Tensor, accumulate: bool, grad_loss: Tensor) -> None:
        """Write the gradient of the loss to the supervised rows of ``grad``, or add it to them.

        ``grad`` has the student's shape. Its other rows are not touched. ``grad_loss`` is a float32
        scalar, or (M,) for reduction "none".
        """

    def grad_proj(self, call: GradCall, grad_loss: Tensor) -> Tensor:
        """Return the gradient (r, dS) of student_proj; ``call.student`` is not None."""

    def forward_layers(self, calls: Sequence[LossCall]) -> tuple[Tensor, Tensor]:
        """Return the losses (L,), and a matrix with the ``saved`` of each layer in a row.

        The matrix is as wide as the largest ``saved``. The calls differ only in their states and
        projectors, and their reduction is not "none".
        """

    def backward_layers_(
        self, calls: Sequence[GradCall], grads: Sequence[Tensor], grad_losses: Tensor
    ) -> None:
        """Write the gradients of sum_l grad_losses[l] * loss[l] with respect to the students."""

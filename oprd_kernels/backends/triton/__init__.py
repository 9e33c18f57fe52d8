"""The Triton backend: any GPU that Triton supports.

No host synchronisation, nothing but allocations and launches on the current stream, so that a call
can be captured in a CUDA graph. With TRITON_INTERPRET=1 in the environment before the first import,
tensors on the CPU go through Triton's interpreter, which is how the kernels are tested where there
is no GPU; they need the interpreter as `benchmarks.interpreter` puts it right.

`backend` turns a call into launches (`launches`, `launch`) of kernels: `identity` and
`identity_wide` compare rows as they are; `operands`, `projected` and `projected_gradients` are the
Bridge's; `reduction` sums rows. `configs` has their block sizes, `saved` says what is kept from
forward to backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from oprd_kernels.backends.protocol import Backend


class _Missing:
    """Stands for the backend where Triton can't be imported: says so, and is never called."""

    name = "triton"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def unavailable(self, device: torch.device) -> str | None:
        """The reason."""
        return f"triton can't be imported ({self.reason}): pip install triton"


BACKEND: Backend
try:
    from oprd_kernels.backends.triton.backend import INTERPRETED, TritonBackend, generation

    BACKEND = TritonBackend()
except ImportError as error:  # no wheel for this platform
    INTERPRETED = False
    BACKEND = _Missing(str(error))  # type: ignore[assignment]

    def generation(device: torch.device) -> str:
        """Not to be asked for without Triton."""
        raise ImportError("triton is not installed")


__all__ = ["BACKEND", "INTERPRETED", "generation"]

"""The Triton backend, for any GPU that Triton supports.

A call only allocates memory and launches kernels on the current stream. It never synchronises with
the host, so it can be captured in a CUDA graph.

If TRITON_INTERPRET=1 is set before the first import, Triton's interpreter runs the kernels on CPU
tensors. The tests use this on machines without a GPU, with the fixes of `benchmarks.interpreter`.

`backend` turns a call into launches (`launches`, `launch`) of kernels. `identity` and
`identity_wide` compare rows without a projection. `operands`, `projected` and `projected_gradients`
are the kernels for projected rows, as the Bridge uses them. `reduction` sums over rows. `configs`
holds the block sizes, and `saved` defines the buffer from forward to backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from oprd_kernels.backends.protocol import Backend


class _Missing:
    """The backend if Triton can't be imported: unavailable, with the reason."""

    name = "triton"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def unavailable(self, device: torch.device) -> str | None:
        """Return why Triton can't be imported."""
        return f"triton can't be imported ({self.reason}): pip install triton"


BACKEND: Backend
try:
    from oprd_kernels.backends.triton.backend import INTERPRETED, TritonBackend, generation

    BACKEND = TritonBackend()
except ImportError as error:  # no wheel for this platform
    INTERPRETED = False
    BACKEND = _Missing(str(error))  # type: ignore[assignment]

    def generation(device: torch.device) -> str:
        """Raise ImportError: there is no device generation without Triton."""
        raise ImportError("triton is not installed")


__all__ = ["BACKEND", "INTERPRETED", "generation"]

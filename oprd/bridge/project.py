"""Projection of hidden states with a bridge's matrices (Eq. 14).

Shapes: N rows of states, M supervised ones, dS and dT widths, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.bridge.bank import Bridge

CHUNK = 4096
"""The number of rows projected at once, which bounds the float32 copy of the states."""


@torch.no_grad()
def project_rows(states: Tensor, rows: Tensor, proj: Tensor, mean: Tensor | None = None) -> Tensor:
    """Compute P (h - mean) for the selected rows, in float32 throughout.

    Args:
        states: (N, d), any floating dtype. Only ``rows`` of it are read, a chunk at a time, so that
            nothing of size M x d is allocated.
        rows: (M,) int64.
        proj: P, (r, d) float32.
        mean: (d,) float32; None: 0.

    Returns:
        (M, r) float32.
    """
    out = torch.empty(rows.numel(), proj.shape[0], dtype=torch.float32, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for picked, z in zip(rows.split(CHUNK), out.split(CHUNK), strict=True):
            h = states[picked].float()
            torch.mm(h if mean is None else h - mean, proj.T, out=z)
    return out


class Projectors:
    """A bridge's matrices, copied once to every device on which hidden states appear."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._copies: dict[tuple[str, int, torch.device], Tensor] = {}

    def _on(self, device: torch.device, name: str, block: int) -> Tensor:
        key = (name, block, device)
        if key not in self._copies:
            self._copies[key] = getattr(self.bridge, name)[block].to(device)
        return self._copies[key]

    def student(self, block: int, device: torch.device) -> Tensor:
        """Return P_S (r, dS) of a student block."""
        return self._on(device, "student_proj", block)

    def teacher(self, block: int, states: Tensor, rows: Tensor) -> Tensor:
        """Return z_T (M, r) of the teacher states (N, dT) paired with a student block."""
        proj, mean = (
            self._on(states.device, name, block) for name in ("teacher_proj", "teacher_mean")
        )
        return project_rows(states, rows, proj, mean)

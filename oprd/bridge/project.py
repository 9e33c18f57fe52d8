"""A bridge's matrices at work during training (Eq. 14).

Shapes: N rows of states, M supervised ones, dS and dT widths, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.bridge.bank import Bridge

CHUNK = 4096
"""Rows projected at once: bounds the float32 copy of the teacher's states."""


@torch.no_grad()
def project_rows(states: Tensor, rows: Tensor, proj: Tensor, mean: Tensor | None = None) -> Tensor:
    """(M, r) float32: P (h - mean) of the rows picked, in float32 throughout.

    Args:
        states: (N, d), any floating dtype. Only ``rows`` of it are read, a chunk at a time:
            nothing of size M x d is allocated.
        rows: (M,) int64.
        proj: (r, d) float32.
        mean: (d,) float32; None: 0.
    """
    out = torch.empty(rows.numel(), proj.shape[0], dtype=torch.float32, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        for picked, z in zip(rows.split(CHUNK), out.split(CHUNK), strict=True):
            h = states[picked].float()
            torch.mm(h if mean is None else h - mean, proj.T, out=z)
    return out


class Projectors:
    """A bridge on the devices where its states appear; copied there once."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._copies: dict[tuple[str, int, torch.device], Tensor] = {}

    def _on(self, device: torch.device, name: str, block: int) -> Tensor:
        key = (name, block, device)
        if key not in self._copies:
            self._copies[key] = getattr(self.bridge, name)[block].to(device)
        return self._copies[key]

    def student(self, block: int, device: torch.device) -> Tensor:
        """P_S (r, dS) of a student block."""
        return self._on(device, "student_proj", block)

    def teacher(self, block: int, states: Tensor, rows: Tensor) -> Tensor:
        """z_T (M, r) of the teacher states (N, dT) that stand beside a student block."""
        proj, mean = (
            self._on(states.device, name, block) for name in ("teacher_proj", "teacher_mean")
        )
        return project_rows(states, rows, proj, mean)

"""Fitting student projectors by gradient descent, as the paper does, on rows that are kept.

Shapes: dS width of the student, r rank, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from oprd.bridge.solve import random_student_proj
from oprd.errors import ConfigError


@dataclass
class SgdConfig:
    """Fitting student projectors as the paper does: AdamW on rows that are kept.

    Attributes:
        epochs: over the kept rows.
        lr: AdamW's; its weight decay is 0.
        batch_rows: rows a step.
        max_rows: at most so many rows, drawn evenly from all, are kept for fitting, and as many
            held-out ones; they take max_rows * student width * 4 bytes a layer each.
    """

    epochs: int = 20
    lr: float = 1e-3
    batch_rows: int = 1024
    max_rows: int = 16384


def sgd(
    student: Tensor,
    target: Tensor,
    held_out_student: Tensor,
    held_out_target: Tensor,
    cfg: SgdConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """P_S (r, dS) float32 by AdamW on the mean squared error; of all epochs, the one whose mean
    cosine on the held-out rows is highest.

    Args:
        student: (N, dS) h_S.
        target: (N, r) P_T (h_T - mu).
        held_out_student, held_out_target: of other rollouts.

    Raises:
        ConfigError: if it diverges from the first epoch on.
    """
    start = random_student_proj(target.shape[1], student.shape[1], seed)
    proj = start.to(device).requires_grad_()
    optimizer = torch.optim.AdamW([proj], lr=cfg.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best, best_cosine = proj.detach().clone(), -float("inf")
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(student), generator=generator).split(cfg.batch_rows):
            h, z = student[rows].to(device).float(), target[rows].to(device).float()
            optimizer.zero_grad()
            mse_loss(h @ proj.T, z).backward()
            optimizer.step()
        cosine = _mean_cosine(proj.detach(), held_out_student, held_out_target, cfg.batch_rows)
        if cosine > best_cosine:
            best, best_cosine = proj.detach().clone(), cosine
    if best_cosine == -float("inf"):
        raise ConfigError(
            f"the projector diverged in every one of {cfg.epochs} epochs: lower sgd.lr"
        )
    return best.cpu()


@torch.no_grad()
def _mean_cosine(proj: Tensor, student: Tensor, target: Tensor, batch_rows: int) -> float:
    total = 0.0
    for h, z in zip(student.split(batch_rows), target.split(batch_rows), strict=True):
        h, z = h.to(proj.device).float(), z.to(proj.device).float()
        total += cosine_similarity(h @ proj.T, z, dim=-1, eps=1e-12).double().sum().item()
    return total / len(student)


class KeptRows:
    """A sample of the rows that stream by, the same rows for every layer, on the CPU."""

    def __init__(self, blocks: Iterable[int], total: int, max_rows: int, seed: int) -> None:
        """
        Args:
            blocks: student blocks.
            total: how many rows will come.
            max_rows: of which at most so many are kept, drawn evenly.
        """
        generator = torch.Generator().manual_seed(seed)
        self._chosen = torch.zeros(total, dtype=torch.bool)
        self._chosen[torch.randperm(total, generator=generator)[:max_rows]] = True
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}
        self._seen = dict.fromkeys(self._rows, 0)

    def pick(self, block: int, count: int) -> Tensor:
        """(K,) int64: which of the next ``count`` rows of a block are to be kept."""
        start = self._seen[block]
        self._seen[block] += count
        return self._chosen[start : start + count].nonzero().squeeze(1)

    def keep(self, block: int, student: Tensor, target: Tensor) -> None:
        """h_S (K, dS) and P_T (h_T - mu) (K, r) of the rows picked."""
        self._rows[block].append((student.cpu(), target.cpu()))

    def of(self, block: int) -> tuple[Tensor, Tensor]:
        """(N, dS) and (N, r)."""
        student, target = zip(*self._rows[block], strict=True)
        return torch.cat(student), torch.cat(target)

"""The fit of student projectors by gradient descent on a sample of rows, as in the paper.

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
    """The configuration of the fit of student projectors with AdamW on a sample of rows.

    Attributes:
        epochs: number of epochs over the sampled rows.
        lr: AdamW's learning rate. The weight decay is 0.
        batch_rows: rows a step.
        max_rows: maximum number of rows sampled uniformly for fitting, and again from the held-out
            rows. Each sample takes up to max_rows * student width * 4 bytes a layer.
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
    """Fit P_S with AdamW on the mean squared error.

    Args:
        student: h_S, (N, dS).
        target: P_T (h_T - mu), (N, r).
        held_out_student, held_out_target: the same for held-out rollouts.
        cfg: epochs, learning rate and batch size.
        seed: seed of the initial projector and of the order of rows.
        device: the device that the projector is fitted on.

    Returns:
        P_S (r, dS) float32, from the epoch with the highest mean cosine on the held-out rows.

    Raises:
        ConfigError: if the projector diverges in every epoch.
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
    """A random sample of streamed rows, kept on the CPU. All layers keep the same rows."""

    def __init__(self, blocks: Iterable[int], total: int, max_rows: int, seed: int) -> None:
        """
        Args:
            blocks: student blocks.
            total: number of rows that will be streamed.
            max_rows: maximum number of rows to keep, sampled uniformly.
            seed: seed of the sample.
        """
        generator = torch.Generator().manual_seed(seed)
        self._chosen = torch.zeros(total, dtype=torch.bool)
        self._chosen[torch.randperm(total, generator=generator)[:max_rows]] = True
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}
        self._seen = dict.fromkeys(self._rows, 0)

    def pick(self, block: int, count: int) -> Tensor:
        """Return the indices of the rows to keep among the next ``count`` rows of a block.

        (K,) int64.
        """
        start = self._seen[block]
        self._seen[block] += count
        return self._chosen[start : start + count].nonzero().squeeze(1)

    def keep(self, block: int, student: Tensor, target: Tensor) -> None:
        """Keep h_S (K, dS) and P_T (h_T - mu) (K, r) of the rows that `pick` returned."""
        self._rows[block].append((student.cpu(), target.cpu()))

    def of(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the kept h_S (N, dS) and P_T (h_T - mu) (N, r) of a block."""
        student, target = zip(*self._rows[block], strict=True)
        return torch.cat(student), torch.cat(target)

"""`fused_rep_loss` in a plain PyTorch loop: any two backbones that return hidden states.

    python examples/plain_loop.py
    python examples/plain_loop.py --steps 200 --kind cosine

Change `backbone` to your models and `batch` to your data; the rest can stay.
"""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from oprd_kernels import fused_rep_loss

VOCABULARY, WIDTH, BATCH, TOKENS = 64, 64, 8, 24
PARTS = 2  # micro-batches of a step


def backbone(layers: int, seed: int) -> nn.Module:
    """A small bidirectional encoder; it maps tokens (B, T) to hidden states (B, T, d)."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
    blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), blocks)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random tokens (B, T), and a mask (B, T) of those whose states are compared."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (BATCH, 1), generator=generator)
    return ids, torch.arange(TOKENS) < lengths


def main(steps: int = 60, lr: float = 3e-3, kind: str = "mse") -> list[float]:
    """Train the student, and return the loss of each step."""
    student, teacher = backbone(layers=1, seed=0), backbone(layers=2, seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr)
    losses = []
    for step in range(steps):
        ids, mask = batch(step)
        total = mask.sum()  # of the whole step, so that its parts add up to one mean
        loss_of_step = 0.0
        for part_ids, part_mask in zip(ids.chunk(PARTS), mask.chunk(PARTS), strict=True):
            with torch.no_grad():
                wanted = teacher(part_ids)
            # Instead of ((student(part_ids).float() - wanted.float()).square().mean(-1)
            #             * part_mask).sum() / total
            loss: Any = fused_rep_loss(
                student(part_ids),
                wanted,
                weights=part_mask,  # 0 leaves a token out, whatever its states are
                kind=kind,  # "mse", "nmse" or "cosine"
                denominator=total,
            )
            loss.backward()
            loss_of_step += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss_of_step:.4f}")
    return losses


if __name__ == "__main__":
    auto_cli(main)

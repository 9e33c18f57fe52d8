"""`rep_tap` inside an `nn.Module` of one's own.

    python examples/custom_module.py

A tap returns the hidden states unchanged and adds the gradient of the loss to the one that flows
back through them: no states are kept aside for a loss, and no zero-filled gradient as large as all
of them is made. Here each block of a small decoder has one. Other losses may be added, as the
next-token loss is here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from oprd_kernels import rep_tap

VOCABULARY, WIDTH, BATCH, TOKENS, PROMPT = 64, 64, 8, 24, 6


class Decoder(nn.Module):
    """A causal transformer whose blocks can be compared with a teacher's."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self, ids: Tensor, targets: Sequence[Tensor] | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run the decoder.

        Args:
            ids: (B, T) tokens.
            targets: a teacher's states (M, d) for each block; None: no comparison.
            rows: (M,) the tokens, of B * T, that the targets belong to.

        Returns:
            Logits (B, T, V), the mean of the blocks' losses, and the blocks' states (B, T, d).
        """
        h = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        losses, states = [], []
        for i, block in enumerate(self.blocks):
            h = block(h, src_mask=mask, is_causal=True)
            if targets is not None:
                h, loss = rep_tap(h, targets[i], rows=rows, kind="mse")
                losses.append(loss)
            states.append(h)
        return self.head(h), torch.stack(losses).mean() if losses else h.new_zeros(()), states


def main(steps: int = 60, lr: float = 3e-3) -> list[tuple[float, float]]:
    """Train, and return the representation loss and the next-token loss of each step."""
    torch.manual_seed(0)
    student, teacher = Decoder(layers=2), Decoder(layers=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr)
    compared = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    compared[:, PROMPT:] = True  # the responses
    rows = compared.flatten().nonzero().squeeze(1)
    losses = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
        with torch.no_grad():
            wanted = [h.flatten(0, 1)[rows] for h in teacher(ids)[2]]
        logits, rep_loss, _ = student(ids, wanted, rows)
        next_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (rep_loss + 0.1 * next_token).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((rep_loss.item(), next_token.item()))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  representation {rep_loss:.4f}  next token {next_token:.4f}")
    return losses


if __name__ == "__main__":
    auto_cli(main)

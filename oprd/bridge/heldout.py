"""Agreement of the projections on held-out rows, for several ranks in one pass.

Shapes: M rows, r rank, K ranks evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oprd import distributed

CHUNK = 4096
"""The number of rows whose running sums (M, r) are in memory at once."""


def ranks_up_to(rank: int) -> list[int]:
    """Return the powers of two up to ``rank``, and ``rank`` itself."""
    powers = [2**i for i in range(rank.bit_length())]
    return powers if powers[-1] == rank else [*powers, rank]


class Agreement:
    """The mean cosine between z_S and z_T over streamed rows, for several ranks.

    A lower rank uses the first coordinates of a higher rank, so running sums along the coordinates
    give all ranks at once.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.count = 0
        self.sums: Tensor = torch.zeros(len(self.ranks), dtype=torch.float64)

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add rows: z_S and z_T (M, r)."""
        last = torch.tensor(self.ranks, device=student.device) - 1

        def up_to(products: Tensor) -> Tensor:
            return products.cumsum(-1)[:, last]

        for z_s, z_t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
            norms = [up_to(z * z).sqrt().clamp(min=1e-12) for z in (z_s, z_t)]
            cosines = up_to(z_s * z_t) / norms[0] / norms[1]
            self.sums += cosines.cpu().double().sum(0)
        self.count += len(student)

    def total_rows(self, device: torch.device) -> int:
        """Return the number of rows over all processes."""
        return round(distributed.sum_over_ranks([float(self.count)], device)[0])

    def mean_cosines(self, device: torch.device) -> list[float]:
        """Return the (K,) mean cosines over the rows of all processes."""
        *sums, count = distributed.sum_over_ranks([*self.sums.tolist(), float(self.count)], device)
        return [x / count for x in sums]

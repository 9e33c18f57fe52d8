"""The order in which training steps take prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from oprd.errors import ConfigError


class PromptSampler(Iterator[list[int]]):
    """An endless iterator over batches of prompt indices.

    Every epoch is a new permutation, and a batch may span two epochs. The position is the number of
    prompts drawn over all ranks, so that a run can resume with another number of ranks.
    """

    def __init__(self, num_prompts: int, batch_size: int, seed: int) -> None:
        self.num_prompts, self.batch_size, self.seed = num_prompts, batch_size, seed
        self._generator = torch.Generator().manual_seed(seed)
        self._pool: list[int] = []
        self.drawn = 0

    def __next__(self) -> list[int]:
        while len(self._pool) < self.batch_size:
            self._pool += torch.randperm(self.num_prompts, generator=self._generator).tolist()
        batch, self._pool = self._pool[: self.batch_size], self._pool[self.batch_size :]
        self.drawn += self.batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, which can be written as JSON."""
        return {"drawn": self.drawn, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Move to the position ``state``.

        Raises:
            ConfigError: if ``state`` is a position in another sequence of prompts.
        """
        ours = {"num_prompts": self.num_prompts, "seed": self.seed}
        theirs = {name: state[name] for name in ours}
        if ours != theirs:
            raise ConfigError(
                f"the checkpoint's position is in another sequence of prompts: the checkpoint has "
                f"{theirs}, this run has {ours}. The files that data names have changed. Restore "
                "them, or begin in a new output_dir"
            )
        self._generator.manual_seed(self.seed)
        epochs, position = divmod(state["drawn"], self.num_prompts)
        for _ in range(epochs + 1):  # a permutation depends on the generator's state after the last
            permutation = torch.randperm(self.num_prompts, generator=self._generator).tolist()
        self._pool, self.drawn = permutation[position:], state["drawn"]

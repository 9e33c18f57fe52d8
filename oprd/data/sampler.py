"""Which prompts a step takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from oprd.errors import ConfigError


class PromptSampler(Iterator[list[int]]):
    """Endless batches of prompt indices: every epoch a new permutation, a batch may span two.

    Its position is how many were drawn, over all ranks: any number of them can go on from there.
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
        """The position, as JSON."""
        return {"drawn": self.drawn, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position.

        Raises:
            ConfigError: if it is one in another sequence of prompts.
        """
        ours = {"num_prompts": self.num_prompts, "seed": self.seed}
        theirs = {name: state[name] for name in ours}
        if ours != theirs:
            raise ConfigError(
                f"the checkpoint's position is in another sequence of prompts: {theirs} there, "
                f"{ours} here: the files that data names have changed. Restore them, or begin in a "
                "new output_dir"
            )
        self._generator.manual_seed(self.seed)
        epochs, position = divmod(state["drawn"], self.num_prompts)
        for _ in range(epochs + 1):  # each permutation follows from the one before
            permutation = torch.randperm(self.num_prompts, generator=self._generator).tolist()
        self._pool, self.drawn = permutation[position:], state["drawn"]

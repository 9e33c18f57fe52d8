"""What an engine is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # an engine's process starts without transformers
    import torch

    from oprd.data.rollout import Rollout


class EngineFailure(RuntimeError):
    """An engine can't go on. The message says what happened, where its log is, what to do."""


class Engine(Protocol):
    """Samples responses to this rank's prompts.

    Attributes:
        device: of this rank.
        policy_version: optimizer steps behind the weights it samples with.
    """

    device: torch.device
    policy_version: int

    def sync(self, version: int) -> None:
        """Make sure that it samples with the student's present weights, those of step ``version``.

        Raises:
            EngineFailure: if it can't.
        """

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Rollout]:
        """One response to each prompt, from the model's own distribution at ``temperature`` and
        ``top_p``; greedy at temperature 0.

        Args:
            prompts: token ids; a prompt that is to get n responses comes n times.
            seed: of the sampling, which then leaves the process's random state as it was; None:
                that state decides.

        Raises:
            EngineFailure: if it can't go on.
        """

    def sleep(self) -> None:
        """Give back what memory can be spared until the next `sync`."""

    def close(self) -> None:
        """End it. Nothing can be asked of it any more."""

"""The interface of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # keeps transformers out of the start of an engine's process
    import torch

    from oprd.config import SamplingParams
    from oprd.data.rollout import Rollout


class EngineFailure(RuntimeError):
    """An engine failed. The message says what happened, where the log is and what to do."""


class Engine(Protocol):
    """A sampler of responses to this rank's prompts.

    `sample` is `start` and then `collect`. Between the two, an engine with a process of its own
    samples while the caller does something else; then only `collect` and `close` may be called.

    Attributes:
        device: the device of this rank.
        policy_version: number of optimizer steps that led to the engine's weights.
    """

    device: torch.device
    policy_version: int

    def sync(self, version: int) -> None:
        """Load the student's current weights, those of step ``version``, if the engine lacks them.

        Raises:
            EngineFailure: if the engine fails.
        """

    def sample(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        seed: int | None = None,
    ) -> list[Rollout]:
        """Sample one response to each prompt.

        Args:
            prompts: token ids; to get n responses, give a prompt n times.
            seed: seed of the sampling, which then leaves the process's random state unchanged. If
                None, the process's random state is used.

        Raises:
            EngineFailure: if the engine fails.
        """

    def start(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        seed: int | None = None,
    ) -> None:
        """Begin to sample, with the arguments of `sample`.

        The process's random state is used here, not in `collect`.
        """

    def collect(self, version: int) -> list[Rollout]:
        """Wait for the responses that `start` began to sample.

        Args:
            version: the step of the student's current weights. If the engine fails and is
                restarted meanwhile, it gets these weights and samples anew; ``policy_version`` is
                then ``version``.

        Raises:
            EngineFailure: if the engine fails.
        """

    def sleep(self) -> None:
        """Free the memory that the engine doesn't need until the next `sync`."""

    def close(self) -> None:
        """Shut the engine down for good."""


class SamplesAtOnce(Engine):
    """`start` and `collect` of an engine without a process of its own: `start` samples."""

    _sampled: list[Rollout] | None = None

    def start(
        self,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        seed: int | None = None,
    ) -> None:
        """See `Engine`. The responses are sampled before it returns."""
        self._sampled = self.sample(prompts, sampling, seed)

    def collect(self, version: int) -> list[Rollout]:
        """See `Engine`."""
        assert self._sampled is not None, "call start before collect"
        sampled, self._sampled = self._sampled, None
        return sampled

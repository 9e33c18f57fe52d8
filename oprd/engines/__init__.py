"""What samples responses: Hugging Face's `generate` on the model itself, or a vLLM engine beside it.

    engine.sync(step)            # it has the student's weights after `step` updates
    rollouts = engine.sample(prompts, max_new_tokens=.., temperature=.., top_p=..)
    engine.sleep()               # its GPU memory is free for the update

All of it is collective: every rank makes the same calls, with prompts of its own or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.rollout import Rollout, generate

__all__ = ["Engine", "EngineFailure", "GenerateEngine"]

Autocast = Callable[[], contextlib.AbstractContextManager]


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


class GenerateEngine:
    """The model itself, by Hugging Face's `generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            batch_size: prompts at once; None: all.
            autocast: the context that the model runs in.
        """
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.autocast = batch_size, autocast
        self.device = model.device
        self.policy_version = 0

    def sync(self, version: int) -> None:
        """See `Engine`."""
        self.policy_version = version

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Rollout]:
        """See `Engine`."""
        if not prompts:
            return []
        with contextlib.ExitStack() as stack:
            if seed is not None:
                devices = [self.device] if self.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(seed)
            stack.enter_context(self.autocast())
            return generate(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                batch_size=self.batch_size,
            )

    def sleep(self) -> None:
        """See `Engine`; the model has nothing to spare."""

    def close(self) -> None:
        """See `Engine`."""

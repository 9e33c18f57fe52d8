"""Hugging Face's `generate` as the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.distributed.fsdp import input_device
from oprd.rollout import Rollout, generate

Autocast = Callable[[], contextlib.AbstractContextManager]


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
        self.device = input_device(model)
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

"""Hugging Face's `generate`, and the engine that samples with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from oprd import distributed
from oprd.config import SamplingParams
from oprd.data.rollout import Rollout
from oprd.distributed.fsdp import input_device, is_sharded, reshard
from oprd.engines.base import SamplesAtOnce
from oprd.models.compile import eager_layers
from oprd.observability import hang_watchdog, progress

Autocast = Callable[[], contextlib.AbstractContextManager]


class GenerateEngine(SamplesAtOnce):
    """An engine that runs Hugging Face's `generate` on the model itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            batch_size: number of prompts per batch; None: all prompts at once.
            autocast: makes the autocast context that the model runs in.
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
        sampling: SamplingParams,
        seed: int | None = None,
    ) -> list[Rollout]:
        """See `Engine`."""
        with contextlib.ExitStack() as stack:
            if seed is not None:
                devices = [self.device] if self.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(seed)
            stack.enter_context(self.autocast())
            return self._sample(prompts, sampling)

    def _sample(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[Rollout]:
        return generate(self.model, self.tokenizer, prompts, sampling, self.batch_size)

    def sleep(self) -> None:
        """See `Engine`. Does nothing: the engine has no memory of its own."""

    def close(self) -> None:
        """See `Engine`."""


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: the EOS tokens of the tokenizer and the model."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own})


@contextlib.contextmanager
def as_sampler(model: PreTrainedModel) -> Iterator[None]:
    """Return a context in which a model samples, and after which it is as it was."""
    was_training = model.training
    model.eval()  # in training mode gradient checkpointing would switch the cache off
    try:
        with torch.no_grad(), eager_layers(model):
            yield
    finally:
        reshard(model)
        model.train(was_training)


def in_order(prompts: Sequence[list[int]], size: int) -> list[int]:
    """Return the order in which prompts are sampled from, ``size`` at once."""
    order = list(range(len(prompts)))
    if size < len(prompts):  # batch prompts of similar length to reduce padding
        order.sort(key=lambda i: len(prompts[i]), reverse=True)
    return order


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both int64 (prompts, tokens of the longest)."""
    length = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        attention[i, length - len(prompt) :] = 1
    return ids, attention


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    batch_size: int | None = None,
) -> list[Rollout]:
    """Sample one response to each prompt with Hugging Face's `generate`.

    The model's own generation configuration (top-k, penalties, ..) is ignored.

    Args:
        prompts: token ids, not padded.
        batch_size: number of prompts per batch; None: all prompts at once.
    """
    ends = eos_ids(model, tokenizer)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "top_k": 0}
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    own_config, model.generation_config = model.generation_config, config
    rollouts: list[Rollout] = []
    # A sharded model's forward passes are collective, so every rank must generate equally often. A
    # rank with fewer batches than others adds batches with a dummy prompt.
    together = is_sharded(model) and distributed.world_size() > 1
    size = batch_size or max(len(prompts), 1)
    order = in_order(prompts, size)
    batches = [
        [prompts[i] for i in order[start : start + size]] for start in range(0, len(prompts), size)
    ]
    calls = len(batches)
    if together:
        calls = int(distributed.max_over_ranks(calls, input_device(model)))
    progress.expect(len(prompts), "responses")
    try:
        with as_sampler(model):
            for batch in batches + [[[ends[0]]]] * (calls - len(batches)):
                rollouts += _generate_batch(model, batch, config, set(ends), together)
                progress.advance(len(batch))
    finally:
        model.generation_config = own_config
    as_given = dict(zip(order, rollouts, strict=False))  # drops the dummy responses at the end
    return [as_given[i] for i in range(len(prompts))]


class _Beat(StoppingCriteria):
    """A stopping criterion that never stops but shows at every token that the run goes on."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        hang_watchdog.beat()
        progress.detail(f"token {input_ids.shape[1] - self.prompt_tokens}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    ends: set[int],
    together: bool,
) -> list[Rollout]:
    ids, attention = left_padded(prompts, config.pad_token_id)
    length, device = ids.shape[1], input_device(model)
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=attention.to(device),
        generation_config=config,
        synced_gpus=together,
        stopping_criteria=StoppingCriteriaList([_Beat(length)]),
    )
    rollouts = []
    for prompt, new in zip(prompts, output[:, length:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(new) if token in ends), None)
        rollouts.append(Rollout(list(prompt), new[:end], truncated=end is None))
    return rollouts

"""Continuous batching on Hugging Face models: a batch whose rows leave it when they end.

`generate` computes every row of a batch until the longest response of the batch has ended. Here a
row that has ended is taken out of the batch and its cache at once, and prompts that wait take the
free places. The forward passes are the model's own, over its ordinary cache, so what `generate`
samples from is sampled from here.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from oprd import distributed
from oprd.config import SamplingParams
from oprd.data.rollout import Rollout
from oprd.distributed.fsdp import input_device, is_sharded
from oprd.engines.cached_rows import cache_name, check_continuous, join, keep, make_cache
from oprd.engines.generate import GenerateEngine, as_sampler, eos_ids, in_order, left_padded
from oprd.observability import hang_watchdog, progress

REFILL = 8
"""Prompts wait until this part (an eighth) of the places is free, so that they are read together:
a pass over prompts takes about as long as one over the whole batch's next tokens."""


class ContinuousEngine(GenerateEngine):
    """An engine with continuous batching on the model itself.

    ``batch_size`` is the number of places in the batch.
    """

    def _sample(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[Rollout]:
        return sample(self.model, self.tokenizer, prompts, sampling, self.batch_size)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    batch_size: int | None = None,
) -> list[Rollout]:
    """Sample one response to each prompt. Collective if the model is sharded.

    Args:
        prompts: token ids, not padded.
        batch_size: number of places in the batch; None: as many as prompts.

    Raises:
        ConfigError: if rows of the model's cache can't be taken out of it (`why_not`).
    """
    check_continuous(model.config, type(model).__name__, "the engine", type(model))
    with as_sampler(model):
        return _Sampler(model, tokenizer, prompts, sampling, batch_size)()


class _Sampler:
    """Samples responses.

    Attributes:
        waiting: indices of the prompts that have no place yet.
        rows: the index of each row's prompt, B of them.
        cache: the cache of the rows.
        mask: which tokens of the cache are not padding; int64 (B, T).
        last: the rows' newest tokens, which are not in the cache yet; int64 (B, 1).
        new: the response to each prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        batch_size: int | None,
    ) -> None:
        self.model, self.prompts, self.most = model, prompts, sampling.max_new_tokens
        self.ends, self.pad_id = set(eos_ids(model, tokenizer)), tokenizer.pad_token_id
        self.greedy = sampling.temperature == 0
        self.warpers = LogitsProcessorList()  # those of `generate`, in its order
        if not self.greedy and sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if not self.greedy and sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        takes = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in takes:
            self.options["logits_to_keep"] = 1
        self.cache_name = cache_name(type(model)) or "cache"
        self.device = input_device(model)
        self.together = is_sharded(model) and distributed.world_size() > 1
        self.places = batch_size or max(len(prompts), 1)
        self.waiting = deque(in_order(prompts, self.places))
        self.rows: list[int] = []
        self.cache = make_cache(model.config)
        self.mask = self.last = torch.empty(0, dtype=torch.long)
        self.new: list[list[int]] = [[] for _ in prompts]

    def __call__(self) -> list[Rollout]:
        progress.expect(len(self.prompts), "responses")
        while self._turn():
            pass
        rollouts = []
        for prompt, new in zip(self.prompts, self.new, strict=True):
            rollouts.append(Rollout(list(prompt), new, truncated=new[-1] not in self.ends))
        return rollouts

    def _turn(self) -> bool:
        """Read prompts if there is room, then sample a token for each row; False: all is done."""
        free = self.places - len(self.rows)
        fill = free >= min(len(self.waiting), -(-self.places // REFILL)) > 0
        go_on = bool(self.rows or self.waiting)
        # The passes of a sharded model are collective: ranks make the same ones, some on a dummy.
        any_fill, any_row = fill, go_on
        if self.together:
            any_fill, any_row = map(bool, distributed.sum_over_ranks([fill, go_on], self.device))
        if any_fill:
            count = min(free, len(self.waiting)) if fill else 0
            self._read([self.waiting.popleft() for _ in range(count)])
        if any_row:
            self._next()
        return any_row

    def _read(self, rows: list[int]) -> None:
        """Read the prompts of new rows, sample their first tokens and add them to the batch."""
        if not rows:
            self._dummy()
            return
        ids, mask = left_padded([self.prompts[i] for i in rows], self.pad_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = make_cache(self.model.config)
        logits = self._forward(ids, mask, cache, first=True)
        old = self.rows, self.cache, self.mask, self.last
        self.rows, self.cache, self.mask = rows, cache, mask
        self._take(self._draw(logits))
        if not old[0]:
            return
        if not self.rows:
            self.rows, self.cache, self.mask, self.last = old
            return
        tokens = max(old[2].shape[1], self.mask.shape[1])
        masks = [pad(m, (tokens - m.shape[1], 0)) for m in (old[2], self.mask)]
        self.rows, self.cache = old[0] + self.rows, join(old[1], self.cache, tokens)
        self.mask, self.last = torch.cat(masks), torch.cat([old[3], self.last])

    def _next(self) -> None:
        """Sample the next token of each row."""
        if not self.rows:
            if self.together:
                self._dummy()
            return
        self.mask = torch.cat([self.mask, torch.ones_like(self.last)], dim=1)
        self._take(self._draw(self._forward(self.last, self.mask, self.cache)))

    def _take(self, tokens: Tensor) -> None:
        """Append a token (B,) to each row, and take the rows out that end with it."""
        going, listed = [], tokens.tolist()
        for i, (row, token) in enumerate(zip(self.rows, listed, strict=True)):
            self.new[row].append(token)
            if token not in self.ends and len(self.new[row]) < self.most:
                going.append(i)
        self.last = tokens[:, None]
        if len(going) == len(self.rows):
            return
        progress.advance(len(self.rows) - len(going))
        self.rows = [self.rows[i] for i in going]
        if not going:
            self.cache = make_cache(self.model.config)
            return
        index = torch.tensor(going, device=self.device)
        self.last, self.mask = self.last[index], self.mask[index]
        length = max(len(self.prompts[i]) + len(self.new[i]) - 1 for i in self.rows)
        self.mask = self.mask[:, -length:]
        keep(self.cache, index, length)

    def _draw(self, logits: Tensor) -> Tensor:
        """Sample a token for each row of logits (B, V)."""
        if self.greedy:
            return logits.argmax(-1)
        scores = self.warpers(self.last, logits)  # which don't look at tokens
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    def _forward(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache, first: bool = False
    ) -> Tensor:
        """Return the logits after the last of ``ids``, float32 (B, V); extend the cache."""
        hang_watchdog.beat()
        progress.detail(f"{len(ids)} at once")
        inputs: dict[str, Any] = {"attention_mask": mask, **self.options}
        inputs[self.cache_name] = cache
        if self.takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=first, **inputs)
        return self.model(**inputs, return_dict=True).logits[:, -1].float()

    def _dummy(self) -> None:
        """Make the pass that another rank makes."""
        one = torch.full((1, 1), min(self.ends), device=self.device)
        self._forward(one, torch.ones_like(one), make_cache(self.model.config), first=True)

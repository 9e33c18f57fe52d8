"""Rollouts: responses that the student samples, and batches made of them.

Shapes: B sequences of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
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
from oprd.distributed.fsdp import input_device, is_sharded, reshard
from oprd.models.compile import eager_layers
from oprd.observability import hang_watchdog


@dataclass(frozen=True)
class Reading:
    """What the teacher reads in place of a rollout's tokens: after another prompt, say.

    Attributes:
        prompt_ids, response_ids: the teacher's token ids.
        pairs: (i, j): the student's i-th response token and the teacher's j-th end at the same
            place of the text; both increase. None: they are the same tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    pairs: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Rollout:
    """A prompt and one response: token ids, EOS included if it was reached.

    Attributes:
        truncated: cut at max_new_tokens, before EOS.
        source: of the prompt, which decides on the teacher.
        reading: what that teacher reads; None: the same.
        log_probs: of its tokens at temperature 1, as the engine that sampled them has them; None:
            it was not asked.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool
    source: str = ""
    reading: Reading | None = None
    log_probs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two models' inputs."""
        return max(len(self), len(self.reading or ()))


@dataclass(frozen=True)
class Batch:
    """Rollouts padded on the right, or packed: one after another in a single row, B = 1.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64; None when packed.
        response_mask: (B, T) bool.
        reading: the same rollouts as the teacher reads them, T' tokens wide; None: as they are.
        partner: (B, T) int64: by state of the student, the row of the teacher's (B * T', d) states
            that has read the same text; -1 where there is none. None without ``reading``.
        position_ids: (1, T) int64 when packed, beginning at 0 for each rollout; else None.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    response_mask: Tensor
    reading: Batch | None = None
    partner: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def for_teacher(self) -> Batch:
        """What the teacher reads."""
        return self if self.reading is None else self.reading


def collate(
    rollouts: Sequence[Rollout],
    pad_id: int,
    device: torch.device | str,
    teacher_pad_id: int | None = None,
    packed: bool = False,
) -> Batch:
    """One batch. A token is masked for its place, never for being the padding id: where pad and EOS
    are one token, the EOS of a response still counts.

    Args:
        rollouts: none of them make a batch of one padding token without a response, for a rank
            that must run something and has nothing.
        teacher_pad_id: of a teacher with another tokenizer.
        packed: one row, without padding, instead of one row a rollout.
    """
    if not rollouts:
        reading = None if teacher_pad_id is None else Reading([teacher_pad_id], [])
        rollouts = [Rollout([pad_id], [], truncated=True, reading=reading)]
    join = _pack if packed else _pad
    batch, starts = join(rollouts, pad_id, device)
    if all(r.reading is None for r in rollouts):
        return batch
    readings = [r.reading or Reading(r.prompt_ids, r.response_ids) for r in rollouts]
    teacher_pad_id = pad_id if teacher_pad_id is None else teacher_pad_id
    reading_batch, their_starts = join(readings, teacher_pad_id, device)
    partner = torch.full((batch.input_ids.numel(),), -1, dtype=torch.long)
    for ours, theirs, start, their_start in zip(
        rollouts, readings, starts, their_starts, strict=True
    ):
        pairs = theirs.pairs
        if pairs is None:
            pairs = [(j, j) for j in range(len(ours.response_ids))]
        # The prompts' last states precede the same text too: they predict its first token.
        mine, its = torch.tensor([(-1, -1), *pairs]).T
        begin, its_begin = start + len(ours.prompt_ids), their_start + len(theirs.prompt_ids)
        partner[begin + mine] = its_begin + its
    partner_BT = partner.view_as(batch.input_ids).to(device)
    return replace(batch, reading=reading_batch, partner=partner_BT)


def _pad(
    rollouts: Sequence[Rollout | Reading], pad_id: int, device: torch.device | str
) -> tuple[Batch, list[int]]:
    """The batch, and where each rollout begins in its flattened tokens."""
    length = max(len(r) for r in rollouts)
    ids = torch.full((len(rollouts), length), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    response = torch.zeros_like(ids, dtype=torch.bool)
    for i, r in enumerate(rollouts):
        ids[i, : len(r)] = torch.tensor(r.prompt_ids + r.response_ids)
        attention[i, : len(r)] = 1
        response[i, len(r.prompt_ids) : len(r)] = True
    starts = [i * length for i in range(len(rollouts))]
    return Batch(ids.to(device), attention.to(device), response.to(device)), starts


def _pack(
    rollouts: Sequence[Rollout | Reading], _pad_id: int, device: torch.device | str
) -> tuple[Batch, list[int]]:
    """As `_pad`, without padding."""
    lengths = [len(r) for r in rollouts]
    ids = torch.tensor([[t for r in rollouts for t in (*r.prompt_ids, *r.response_ids)]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    prompts = torch.tensor([len(r.prompt_ids) for r in rollouts])
    response = positions >= prompts.repeat_interleave(torch.tensor(lengths))
    starts = [end - n for end, n in zip(accumulate(lengths), lengths, strict=True)]
    batch = Batch(ids.to(device), None, response.to(device), position_ids=positions.to(device))
    return batch, starts


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's EOS and the model's own."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own})


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    batch_size: int | None = None,
) -> list[Rollout]:
    """One response to each prompt, by Hugging Face's `generate`.

    Sampling follows the model's own distribution at ``temperature`` and ``top_p``: no other
    setting of its generation configuration (top-k, penalties, ..) is used.

    Args:
        prompts: token ids, not padded.
        temperature: 0 for greedy decoding.
        batch_size: prompts at once; None: all.
    """
    ends = eos_ids(model, tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    was_training = model.training
    model.eval()  # in training mode gradient checkpointing would switch the cache off
    own_config, model.generation_config = model.generation_config, config
    rollouts: list[Rollout] = []
    # A sharded model's forward passes are collective: every rank generates as often as any other,
    # if need be from a prompt that nobody asked for.
    together = is_sharded(model) and distributed.world_size() > 1
    size = batch_size or max(len(prompts), 1)
    order = list(range(len(prompts)))
    if size < len(prompts):  # prompts of like length share a batch, for less padding
        order.sort(key=lambda i: len(prompts[i]), reverse=True)
    batches = [
        [prompts[i] for i in order[start : start + size]] for start in range(0, len(prompts), size)
    ]
    calls = len(batches)
    if together:
        calls = int(distributed.max_over_ranks(calls, input_device(model)))
    try:
        with eager_layers(model):
            for batch in batches + [[[ends[0]]]] * (calls - len(batches)):
                rollouts += _generate_batch(model, batch, config, set(ends), together)
    finally:
        reshard(model)
        model.generation_config = own_config
        model.train(was_training)
    as_given = dict(zip(order, rollouts, strict=False))  # without those that nobody asked for
    return [as_given[i] for i in range(len(prompts))]


class _Beat(StoppingCriteria):
    """Never stops; says that a token has come."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        hang_watchdog.beat()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    ends: set[int],
    together: bool,
) -> list[Rollout]:
    length = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), length), config.pad_token_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        attention[i, length - len(prompt) :] = 1
    device = input_device(model)
    output = model.generate(
        input_ids=ids.to(device), attention_mask=attention.to(device),
        generation_config=config, synced_gpus=together,
        stopping_criteria=StoppingCriteriaList([_Beat()]),
    )  # fmt: skip
    rollouts = []
    for prompt, new in zip(prompts, output[:, length:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(new) if token in ends), None)
        rollouts.append(Rollout(list(prompt), new[:end], truncated=end is None))
    return rollouts

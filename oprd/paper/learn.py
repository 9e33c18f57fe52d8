"""Supervised training of the models of ``oprd-paper``, and their accuracy as they sample.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from oprd.config import SamplingParams
from oprd.data.rollout import Rollout
from oprd.engines.continuous import sample
from oprd.evaluation.grading import last_boxed
from oprd.paper.task import RESPONSE_TOKENS, Problem

Example = tuple[Problem, str]
"""A problem and the response to learn."""
BATCH = 96
"""Examples in a step of supervised training."""


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    """Make a Llama with random weights, 4 heads and an untied head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=0.06,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            attn_implementation="eager",  # in bfloat16 on a CPU, twice as fast as sdpa
        )
    )


def encode(
    prompts: Sequence[str], responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Encode prompts and responses with EOS, right-padded.

    Returns:
        The tokens and the labels, -100 outside responses; both int64 (B, T).
    """
    before = tokenizer([*prompts])["input_ids"]
    after = tokenizer([text + tokenizer.eos_token for text in responses])["input_ids"]
    length = max(len(p) + len(r) for p, r in zip(before, after, strict=True))
    ids = torch.full((len(before), length), tokenizer.pad_token_id)
    labels = torch.full((len(before), length), -100)
    for row, (p, r) in enumerate(zip(before, after, strict=True)):
        ids[row, : len(p) + len(r)] = torch.tensor(p + r)
        labels[row, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids, labels


def _batches(
    examples: Iterator[Example], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield encoded batches, each of examples of about the same length."""
    rng = random.Random(0)
    while True:
        pool = [next(examples) for _ in range(8 * BATCH)]
        pool.sort(key=lambda example: len(example[1]))
        starts = [*range(0, len(pool), BATCH)]
        rng.shuffle(starts)
        for start in starts:
            problems, texts = zip(*pool[start : start + BATCH], strict=True)
            yield encode([problem.prompt for problem in problems], texts, tokenizer)


def _has_bf16() -> bool:
    """Return whether matrix products in bfloat16 are fast on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def learn(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
    lr: Callable[[int], float | None],
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train with supervision, with AdamW, until ``lr`` ends.

    Args:
        lr: the learning rate of a step, counted from 1; None: training has ended.
        after: called after each step with its number and its loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    batches, bf16 = _batches(examples, tokenizer), _has_bf16()
    step = 0
    while (rate := lr(step := step + 1)) is not None:
        optimizer.param_groups[0]["lr"] = rate
        ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after(step, loss.item())


def respond(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    temperature: float = 1.0,
) -> list[tuple[Rollout, str, bool]]:
    """Sample a response to each problem; return it, its text and whether its answer is right."""
    prompts = tokenizer([p.prompt for p in problems])["input_ids"]
    with torch.no_grad():
        rollouts = sample(
            model, tokenizer, prompts, SamplingParams(RESPONSE_TOKENS, temperature), 256
        )
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    return [
        (rollout, text, last_boxed(text) == str(problem.a + problem.b))
        for rollout, text, problem in zip(rollouts, texts, problems, strict=True)
    ]


def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    temperature: float = 1.0,
) -> tuple[float, float]:
    """Return the share of right answers, as sampled, and the mean length of the responses."""
    found = respond(model, tokenizer, problems, temperature)
    right = sum(right for *_, right in found) / len(found)
    return right, sum(len(r.response_ids) for r, *_ in found) / len(found)


class Said:
    """Says at most every ten seconds how far a training is."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if now - self.last >= 10:
            self.last = now
            print(f"{self.name}: step {step}  loss {loss:.4f}", flush=True)

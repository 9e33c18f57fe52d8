"""Sampling of a model's responses, in units that the ranks share."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from oprd import distributed
from oprd.config import SamplingParams
from oprd.data.prompts import Prompt
from oprd.engines.base import Engine
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.evaluate import Sample
from oprd.evaluation.sets import EvalSet
from oprd.evaluation.store import Key, Store

logger = logging.getLogger(__name__)

SAY_EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Task:
    """A model's problems of a set.

    Attributes:
        prompts: in the model's tokens.
        max_new_tokens: of each response.
    """

    eval_set: EvalSet
    prompts: list[Prompt]
    max_new_tokens: int

    def settings(self) -> dict[str, Any]:
        """Return what decides what is sampled, as plain values."""
        text = json.dumps([[p.token_ids, p.answer] for p in self.prompts])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return {
            "prompts": digest,
            "problems": len(self.prompts),
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True, eq=False)
class Unit:
    """Responses that are sampled at once: (problem, sample) pairs of a task."""

    task: Task
    name: str
    pairs: list[tuple[int, int]]

    @property
    def keys(self) -> set[Key]:
        return {(self.name, *pair) for pair in self.pairs}

    def seed(self, seed: int) -> int:
        """Return a seed of its own, the same in every process."""
        return zlib.crc32(f"{seed} {self.name} {self.pairs[0]}".encode())


class Sampler:
    """Samples a model's tasks.

    Attributes:
        store: where the samples are kept.
        label: the model's name in it.
        tokenizer: the model's tokenizer.
    """

    def __init__(
        self, cfg: EvalRunConfig, store: Store, label: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.cfg, self.store, self.label, self.tokenizer = cfg, store, label, tokenizer

    def units(self, task: Task) -> list[Unit]:
        """Split a task into what is sampled at once. This does not depend on the ranks."""
        n, name = self.cfg.samples, task.eval_set.name
        pairs = [(p, s) for p in range(len(task.prompts)) for s in range(n)]
        size = self.cfg.unit
        return [Unit(task, name, pairs[i : i + size]) for i in range(0, len(pairs), size)]

    def fill(self, engine: Engine, tasks: Sequence[Task], missing: list[Unit]) -> None:
        """Sample units, which the ranks share. Collective."""
        part = self.store.part(self.label, distributed.rank())
        progress = _Progress(self.label, sum(len(u.pairs) for u in missing))
        try:
            for task in tasks:
                # One set after the other: the ranks of a tensor-parallel engine ask alike.
                units = [u for u in missing if u.task is task]
                for first in range(0, len(units), distributed.world_size()):
                    together = units[first : first + distributed.world_size()]
                    unit = (
                        together[distributed.rank()] if distributed.rank() < len(together) else None
                    )
                    part.add(task.eval_set.name, self._sampled(engine, task, unit))
                    progress.add(sum(len(u.pairs) for u in together))
        finally:
            part.close()

    def _sampled(self, engine: Engine, task: Task, unit: Unit | None) -> list[Sample]:
        """Sample a unit; None: this rank only takes part."""
        cfg, pairs = self.cfg, [] if unit is None else unit.pairs
        sampling = SamplingParams(task.max_new_tokens, cfg.temperature, cfg.top_p)
        ids = [task.prompts[p].token_ids for p, _ in pairs]
        seed = 0 if unit is None else unit.seed(cfg.seed)
        try:
            rollouts = engine.sample(ids, sampling, seed=seed)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{min(len(ids), cfg.at_once)} sequences of up to {task.max_new_tokens} new tokens "
                f"do not fit the GPU's memory: lower --batch_size (now {cfg.at_once}), or use "
                f"--engine vllm. What was sampled is kept: add --output_dir {self.store.directory} "
                "to go on"
            ) from error
        texts = self.tokenizer.batch_decode(
            [r.response_ids for r in rollouts], skip_special_tokens=True
        )
        prompts = self.tokenizer.batch_decode(ids)
        return [
            Sample(
                problem=problem,
                sample=number,
                prompt=prompt,
                response=text,
                answer=task.prompts[problem].answer,
                length=len(rollout.response_ids),
                truncated=rollout.truncated,
                ids=rollout.response_ids if cfg.teacher is not None else None,
            )
            for (problem, number), prompt, text, rollout in zip(
                pairs, prompts, texts, rollouts, strict=True
            )
        ]


class _Progress:
    """Says every few seconds how far the sampling is."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.started = self.said = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said < SAY_EVERY and self.done < self.total:
            return
        self.said, spent = now, now - self.started
        left = spent / self.done * (self.total - self.done)
        line = f"{self.label}: {self.done:,} of {self.total:,} samples, {spent:.0f} s"
        logger.info(line + (f", {left:.0f} s left" if self.done < self.total else ""))

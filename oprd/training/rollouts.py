"""The rollouts of a run's steps: draws prompts, samples responses, checks the engine's weights.

Step n makes the weights of version n out of those of version n - 1. Its order of events is

    rollout.staleness: 0            rollout.staleness: 1
    sync the weights n - 1          collect the responses of step n, of version n - 2
    sample the responses of step n  sync the weights n - 1
    compare their log-probs         probe the engine, compare log-probs
    update                          start to sample the responses of step n + 1
                                    update, while the engine samples

With staleness 1, the first step samples its own responses as with staleness 0, and the last one
starts nothing.

The check compares log-probs of engine and student at the same version, which both have only between
a sync and the update after it. By then the responses that the engine samples during the update do
not exist, and the student has no old weights left to compare them with later. So the engine first
samples a few tokens for the check alone: the last ones of the responses that it returned before.
These depend on contexts as long as in training, and need only as many decoding steps as there are
tokens to compare in a response.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedModel

from oprd import distributed
from oprd.config import TrainConfig
from oprd.data.rollout import Rollout, for_teacher
from oprd.data.sampler import PromptSampler
from oprd.engines.base import Engine, EngineFailure
from oprd.engines.factory import rollout_gap, too_wide
from oprd.engines.generate import eos_ids
from oprd.engines.vllm.engine import VllmEngine
from oprd.observability.timer import PhaseTimer
from oprd.training.inputs import RunInputs

Saved = list[dict[str, Any]]
"""A batch as JSON values: for each prompt its index, its responses and the version that sampled."""


@dataclass
class Batch:
    """This rank's part of a step's rollouts.

    Attributes:
        step: the step that they are for, counted from 1.
        indices: indices of the prompts.
        rollouts: ``responses_per_prompt`` rollouts of each prompt, in this order.
        version: number of updates of the weights that sampled them.
    """

    step: int
    indices: list[int]
    rollouts: list[Rollout]
    version: int


@dataclass
class _Pending:
    """A batch that the engine samples; ``before`` is the sampler's state before it was drawn."""

    step: int
    indices: list[int]
    before: dict[str, int]


class Rollouts:
    """The source of a run's rollouts.

    Attributes:
        position: the sampler's state for a checkpoint.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        inputs: RunInputs,
        student: PreTrainedModel,
        engine: Engine,
        batches: PromptSampler,
        timer: PhaseTimer,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        assert inputs.train is not None
        assert inputs.tokenizer is not None
        self.cfg, self.student, self.engine = cfg, student, engine
        self.batches, self.timer, self.autocast = batches, timer, autocast
        self.prompts, self.aligners = inputs.train.prompts, inputs.aligners
        self.ends = eos_ids(student, inputs.tokenizer)
        self.held: Batch | None = None
        self.pending: _Pending | None = None
        self.snapshot()

    def take(self, step: int) -> tuple[list[Rollout], dict[str, Any]]:
        """Return this rank's rollouts of the step after ``step``, and metrics. Collective.

        With staleness 1, the responses of the step after that are being sampled when this returns.

        Raises:
            EngineFailure: if the engine fails, or does not have the student's weights.
        """
        self.settle(step)
        batch = self._held(step)
        with self._named(f"step {step + 1}: its responses"):
            if batch is None:
                batch, checked = self._sampled_now(step)
            else:
                with self.synced(self.engine, step):
                    checked = self._probe(batch, step)
        metrics = self._versions(batch) | self._check_gap(checked, step)
        if self.cfg.rollout.staleness and step + 1 < self.cfg.steps:
            self._start(step + 2)
        return batch.rollouts, metrics

    def is_pending(self, step: int) -> bool:
        """Return whether the responses of the step after ``step`` are being sampled."""
        return self.pending is not None and self.pending.step == step + 1

    def settle(self, step: int) -> None:
        """Wait for the responses of the step after ``step``, if they are being sampled. Collective.

        Call this before the engine is asked for anything else, and before a checkpoint.

        Raises:
            EngineFailure: if the engine fails. The responses are lost, and `position` is the one
                before their prompts.
        """
        pending = self.pending
        if pending is None or pending.step != step + 1:
            return
        self.pending, version = None, self.engine.policy_version
        what = f"step {step + 1}: its responses, being sampled with the weights of step {version},"
        try:
            with self._named(what), self.timer("rollout"):
                rollouts = self.engine.collect(step)
        except BaseException:
            self.position = pending.before
            raise
        self.held = self._batch(pending.step, pending.indices, rollouts)

    def snapshot(self) -> None:
        """Capture the sampler's state for a checkpoint; `take` changes it."""
        self.position = self.batches.state_dict()

    def saved(self, step: int) -> Saved | None:
        """Return this rank's rollouts for a checkpoint of ``step``, if they were sampled ahead."""
        if (batch := self._held(step)) is None:
            return None
        each = len(batch.rollouts) // len(batch.indices)
        responses = [[r.response_ids, r.truncated] for r in batch.rollouts]
        return [
            {"prompt": i, "version": batch.version, "responses": responses[n * each :][:each]}
            for n, i in enumerate(batch.indices)
        ]

    def restore(self, step: int, parts: Sequence[Saved]) -> None:
        """Take this rank's part of the rollouts that all ranks of a checkpoint have saved.

        Args:
            step: the step of the checkpoint.
            parts: what `saved` returned on each rank; their number need not be that of now.
        """
        drawn = [entry for row in zip_longest(*parts) for entry in row if entry is not None]
        mine = drawn[distributed.rank() :: distributed.world_size()]
        if not mine:
            return
        rollouts = [
            self._read(Rollout(self.prompts[e["prompt"]].token_ids, ids, truncated), e["prompt"])
            for e in mine
            for ids, truncated in e["responses"]
        ]
        version = min(entry["version"] for entry in mine)
        self.held = Batch(step + 1, [e["prompt"] for e in mine], rollouts, version)

    @contextlib.contextmanager
    def synced(self, engine: Engine, step: int) -> Iterator[None]:
        """Return a context in which the engine samples with the student's weights of ``step``.

        Raises:
            EngineFailure: if the engine fails.
        """
        if isinstance(engine, VllmEngine):
            with self.timer("weight sync"):
                engine.sync(step)
        else:
            engine.sync(step)
        yield
        engine.sleep()

    # Internals ----------------------------------------------------------------------------------

    def _held(self, step: int) -> Batch | None:
        return self.held if self.held is not None and self.held.step == step + 1 else None

    def _draw(self) -> list[int]:
        """Draw a step's prompts and return the indices of this rank's."""
        return next(self.batches)[distributed.rank() :: distributed.world_size()]

    def _prompts(self, indices: Sequence[int]) -> list[list[int]]:
        n = self.cfg.rollout.responses_per_prompt
        return [self.prompts[i].token_ids for i in indices for _ in range(n)]

    def _read(self, rollout: Rollout, index: int) -> Rollout:
        return for_teacher(rollout, self.prompts[index], self.aligners, self.ends)

    def _batch(self, step: int, indices: list[int], rollouts: Sequence[Rollout]) -> Batch:
        n = self.cfg.rollout.responses_per_prompt
        read = [self._read(rollout, indices[i // n]) for i, rollout in enumerate(rollouts)]
        return Batch(step, indices, read, self.engine.policy_version)

    def _sampled_now(self, step: int) -> tuple[Batch, list[Rollout]]:
        """Sample the rollouts of the step after ``step``; all of them can be checked."""
        indices = self._draw()
        with self.synced(self.engine, step), self.timer("rollout"):
            rollouts = self.engine.sample(self._prompts(indices), self.cfg.rollout.sampling)
        batch = self._batch(step + 1, indices, rollouts)
        return batch, batch.rollouts

    def _start(self, step: int) -> None:
        """Start to sample the responses of ``step``."""
        before, indices = self.batches.state_dict(), self._draw()
        with self._named(f"step {step}: its responses"), self.timer("rollout"):
            self.engine.start(self._prompts(indices), self.cfg.rollout.sampling)
        self.pending = _Pending(step, indices, before)

    def _is_checked(self) -> bool:
        rollout = self.cfg.rollout
        return rollout.engine == "vllm" and rollout.vllm.gap_responses > 0

    def _probe(self, batch: Batch, step: int) -> list[Rollout]:
        """Sample the last tokens of some of the batch's responses with the engine's weights."""
        r = self.cfg.rollout
        if not self._is_checked():
            return []
        some = batch.rollouts[: r.vllm.gap_responses]
        contexts = [x.prompt_ids + x.response_ids[: -r.vllm.gap_tokens] for x in some]
        few = replace(r.sampling, max_new_tokens=min(r.vllm.gap_tokens, r.max_new_tokens))
        with self.timer("gap check"):
            return self.engine.sample(contexts, few, seed=step)

    def _check_gap(self, rollouts: Sequence[Rollout], step: int) -> dict[str, Any]:
        """Check that the engine samples with the student's weights; return the gap as metrics."""
        if not self._is_checked():
            return {}
        with self.timer("gap check"), self.autocast():
            gap = rollout_gap(self.cfg, self.student, rollouts, self.engine.device)
        if gap is None:
            return {}
        if why := too_wide(self.cfg, gap, step):
            raise EngineFailure(f"step {step + 1}: {why}")
        return gap.metrics

    def _versions(self, batch: Batch) -> dict[str, Any]:
        """Return which weights have sampled a batch: the oldest of all ranks."""
        version = batch.version
        if self.cfg.rollout.staleness:  # ranks differ if the engine of one was restarted
            version = -int(distributed.max_over_ranks(-float(version), self.engine.device))
        return {"rollout/policy_version": version, "rollout/staleness": batch.step - 1 - version}

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Say in a failure of the engine what was being sampled."""
        try:
            yield
        except EngineFailure as error:
            raise EngineFailure(f"{what} could not be sampled: {error}") from error

"""Evaluations during a run: the teachers, and the student before, during and after training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.config import EvalConfig
from oprd.engines.base import Engine
from oprd.engines.factory import engine_on
from oprd.engines.generate import Autocast, GenerateEngine
from oprd.evaluation.evaluate import Kept, evaluate
from oprd.observability import progress
from oprd.observability.run_log import RunLog
from oprd.observability.summary import EvalResult
from oprd.observability.timer import PhaseTimer
from oprd.training.inputs import RunInputs


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, and what its results are used for.

    Attributes:
        label: name in logs, checkpoints and the summary.
        teacher: name of the teacher; None: the student is evaluated.
        is_kept: whether the results appear in the summary.
        may_be_best: whether the results may make a checkpoint the best one (``keep_best``).
    """

    label: str
    teacher: str | None = None
    is_kept: bool = True
    may_be_best: bool = False

    @classmethod
    def of_teacher(cls, name: str) -> Subject:
        """Return the subject for the teacher ``name`` ("" if the run has one teacher)."""
        return cls(f"teacher {name}".strip(), teacher=name)


BEFORE = Subject("student before")
DURING = Subject("student", is_kept=False, may_be_best=True)
AFTER = Subject("student after", may_be_best=True)


class Evaluator:
    """Evaluates models on the evaluation sets of a run, logs the results and keeps them.

    Attributes:
        results: the kept results, by label of the subject, then by evaluation set.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        inputs: RunInputs,
        log: RunLog,
        timer: PhaseTimer,
        autocast: Autocast,
        synced: Callable[[Engine], AbstractContextManager],
        kind: str = "generate",
    ) -> None:
        """
        Args:
            inputs: contains the evaluation sets and each model's tokenizer.
            synced: returns a context manager in which an engine has the student's current weights.
            kind: the run's kind of engine (``rollout.engine``).
        """
        self.cfg, self.inputs, self.log, self.timer = cfg, inputs, log, timer
        self.autocast, self.synced, self.kind = autocast, synced, kind
        self.results: dict[str, dict[str, EvalResult]] = {}

    def is_done(self, subject: Subject) -> bool:
        """Return whether the subject has results, for example from before the run was resumed."""
        return subject.label in self.results

    def recall(self, evaluations: Mapping[str, Mapping[str, Any]], finished: bool) -> None:
        """Restore `results` from a checkpoint's JSON values.

        Args:
            finished: whether no more steps follow. Otherwise the student after training will be a
                different one.
        """
        for label, results in evaluations.items():
            if finished or label != AFTER.label:
                self.results[label] = {n: EvalResult(**r) for n, r in results.items()}

    def due(self, step: int, steps: int) -> list[str]:
        """Return the names of the sets to evaluate on after ``step``; none after the last step."""
        sets = self.inputs.eval_sets
        return [n for n in sets if (k := self.cfg.sets[n].every) and step % k == 0 and step < steps]

    def __call__(
        self,
        subject: Subject,
        step: int,
        model: PreTrainedModel,
        engine: Engine | None = None,
        sets: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Evaluate the subject, unless it has results already.

        Args:
            step: number of optimizer steps made.
            model: the subject's model.
            engine: an engine that samples from ``model``. None or a `GenerateEngine`: a new
                one on the model itself is used, with batches of ``eval.batch_size``.
            sets: names of the evaluation sets; None: all.

        Returns:
            The metrics; empty if nothing was evaluated.
        """
        names = list(self.inputs.eval_sets) if sets is None else sets
        if not names or self.is_done(subject):
            return {}
        tokenizer = self._tokenizer(subject)
        synced = contextlib.nullcontext if engine is None else self.synced
        if engine is None or isinstance(engine, GenerateEngine):
            engine = engine_on(model, tokenizer, self.kind, self.cfg.batch_size, self.autocast)
        with synced(engine), self.timer("evaluation"):
            results = {}
            for name in names:
                prompts = self.inputs.prompts_for(subject.teacher, name)
                kept = self._kept(subject, step, name)
                with progress.work(f"{subject.label} on {name}"):
                    results[name] = evaluate(engine, tokenizer, prompts, self.cfg, 0, kept)
        self.timer.drop_step()
        self.log.evaluation(step, subject.label, results)
        if subject.is_kept:
            self.results[subject.label] = results
        return {k: v for name, r in results.items() for k, v in r.metrics(name).items()}

    def _kept(self, subject: Subject, step: int, name: str) -> Kept | None:
        """Return the file of an evaluation's samples, which a repeated one replaces."""
        if not self.cfg.keep_samples:
            return None
        words = "".join(c if c.isalnum() else "_" for c in f"{subject.label}_{name}")
        file = self.log.directory / "samples" / f"samples_{step:08d}_{words}.jsonl"
        return Kept(file, {"step": step, "model": subject.label, "set": name})

    def _tokenizer(self, subject: Subject) -> PreTrainedTokenizerBase:
        assert self.inputs.tokenizer is not None
        if subject.teacher is None:
            return self.inputs.tokenizer
        return self.inputs.teacher_tokenizers.get(subject.teacher, self.inputs.tokenizer)

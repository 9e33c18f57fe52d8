"""Evaluation of a model on one set of prompts, within a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from oprd import distributed
from oprd.atomic_files import write_whole
from oprd.config import EvalConfig
from oprd.data.prompts import Prompt
from oprd.engines.base import Engine
from oprd.evaluation.grader_pool import Grade, grade_all
from oprd.evaluation.metrics import Scored, distinct_4grams, result
from oprd.observability.summary import EvalResult


@dataclass(frozen=True)
class Sample:
    """One response to a problem.

    Attributes:
        problem: index of the problem in its set.
        sample: index of the response, below k.
        prompt: text that the model read.
        response: text that it wrote, without special tokens.
        answer: the reference answer; None if there is none.
        length: number of tokens of the response, including EOS.
        truncated: whether it ended without EOS.
        score: see `oprd.evaluation.grader_pool.Grade`, as ``boxed`` and ``failed``; None before
            grading.
        ids: the tokens of the response; None: not kept.
    """

    problem: int
    sample: int
    prompt: str
    response: str
    answer: str | None
    length: int
    truncated: bool
    score: float | None = None
    boxed: bool | None = None
    failed: str | None = None
    ids: list[int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as plain values, without tokens that were not kept."""
        return {k: v for k, v in vars(self).items() if k != "ids" or v is not None}

    @property
    def grade(self) -> Grade | None:
        """The grade; None before grading."""
        return None if self.score is None else Grade(self.score, self.boxed, self.failed)


def scored(samples: Sequence[Sample]) -> Scored:
    """Return what the statistics need of the graded responses to one problem."""
    grades = [s.grade for s in samples]
    known = [g for g in grades if g is not None]
    boxed = [g.boxed for g in known if g.boxed is not None]
    return Scored(
        right=[g.right for g in known] if len(known) == len(samples) else None,
        lengths=[s.length for s in samples],
        truncated=[s.truncated for s in samples],
        dist_4g=distinct_4grams([s.response for s in samples]),
        boxed=boxed or None,
        ungraded=sum(g.failed is not None for g in known),
    )


def sample_all(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cfg: EvalConfig,
    seed: int = 0,
) -> list[Sample]:
    """Sample ``cfg.samples`` responses to every prompt and grade them. Collective.

    Each rank evaluates a part of the prompts. Sampling uses its own random state, seeded by
    ``seed``, so that an evaluation does not change the training run.

    Args:
        engine: an engine that samples from the evaluated model.
        tokenizer: the evaluated model's tokenizer.

    Returns:
        The samples of this rank, those of a problem one after another.
    """
    k = cfg.samples
    mine = range(distributed.rank(), len(prompts), distributed.world_size())
    rollouts = engine.sample(
        [prompts[i].token_ids for i in mine for _ in range(k)],
        cfg.sampling,
        seed=seed + distributed.rank(),
    )
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    answers = [prompts[i].answer for i in mine for _ in range(k)]
    known = [answer for answer in answers if answer is not None]
    assert len(known) == len(answers)
    grades = grade_all(cfg.grader, texts, known)
    asked = tokenizer.batch_decode([prompts[i].token_ids for i in mine])
    return [
        Sample(
            problem=mine[n // k],
            sample=n % k,
            prompt=asked[n // k],
            response=text,
            answer=answer,
            length=len(rollout.response_ids),
            truncated=rollout.truncated,
            score=grade.score,
            boxed=grade.boxed,
            failed=grade.failed,
        )
        for n, (text, answer, rollout, grade) in enumerate(
            zip(texts, answers, rollouts, grades, strict=True)
        )
    ]


@dataclass(frozen=True)
class Kept:
    """Where samples are written, one a line as JSON.

    Attributes:
        file: the file.
        entries: what every line begins with.
    """

    file: Path
    entries: dict[str, Any]


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cfg: EvalConfig,
    seed: int = 0,
    keep: Kept | None = None,
) -> EvalResult:
    """Sample responses with `sample_all`. Collective.

    Args:
        keep: where rank 0 writes all samples; None: they are lost.

    Returns:
        The results over the prompts of all ranks.
    """
    samples = sample_all(engine, tokenizer, prompts, cfg, seed)
    k = cfg.samples
    own = [(samples[i].problem, scored(samples[i : i + k])) for i in range(0, len(samples), k)]
    if keep is not None:
        every = sorted(distributed.gather(samples), key=lambda s: (s.problem, s.sample))
        if distributed.rank() == 0:
            write_samples(keep.file, every, keep.entries)
    problems = sorted(distributed.gather(own), key=lambda entry: entry[0])
    return result([problem for _, problem in problems])


def write_samples(file: Path, samples: Sequence[Sample], entries: dict[str, Any]) -> None:
    """Write samples as JSON lines, atomically.

    Args:
        entries: what every line begins with.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(entries | s.as_dict()) + "\n" for s in samples))

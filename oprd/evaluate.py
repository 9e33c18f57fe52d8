"""Accuracy and style of sampled responses: Avg@k, Best@k, Dist-4g, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from oprd import distributed
from oprd.config import EvalConfig
from oprd.data import Prompt
from oprd.engines.base import Engine
from oprd.grading import GRADERS


@dataclass(frozen=True)
class EvalResult:
    """Means over the prompts of a set.

    Attributes:
        avg: share of right responses (Avg@k, 0..1).
        best: share of prompts with a right one among k (Best@k).
        dist_4g: 100 * unique / all whitespace-word 4-grams, pooled over a prompt's responses,
            then averaged; None if no response is four words long.
        length: mean tokens of a response, EOS included.
        truncated: share of responses that did not end by themselves.
        samples: k.
    """

    avg: float
    best: float
    dist_4g: float | None
    length: float
    truncated: float
    samples: int

    def metrics(self, name: str) -> dict[str, float]:
        """Under the names that the field plots: ``val/<set>/avg@k`` and so on."""
        k = self.samples
        values = {
            f"avg@{k}": self.avg,
            f"best@{k}": self.best,
            "dist_4g": self.dist_4g,
            "len": self.length,
            "truncated": self.truncated,
        }
        return {f"val/{name}/{key}": v for key, v in values.items() if v is not None}

    def as_dict(self) -> dict:
        return asdict(self)


def distinct_4grams(responses: Sequence[str]) -> float | None:
    """100 * unique / all 4-grams of white-space separated words, pooled over ``responses``."""
    texts = [response.split() for response in responses]
    grams = [tuple(words[i : i + 4]) for words in texts for i in range(len(words) - 3)]
    return 100 * len(set(grams)) / len(grams) if grams else None


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cfg: EvalConfig,
    seed: int = 0,
) -> EvalResult:
    """Sample ``cfg.samples`` responses to every prompt and grade them; each rank takes a share.

    Sampling has a random state of its own (``seed``): evaluating changes nothing in training.

    Args:
        engine: with the weights that are to be evaluated.
        tokenizer: of the model.
    """
    k, grade = cfg.samples, GRADERS[cfg.grader]
    mine = prompts[distributed.rank() :: distributed.world_size()]
    rollouts = engine.sample(
        [p.token_ids for p in mine for _ in range(k)],
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=seed + distributed.rank(),
    )
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    right = best = dist_sum = dist_count = 0.0
    for i, prompt in enumerate(mine):
        assert prompt.answer is not None
        responses = texts[i * k : (i + 1) * k]
        grades = [grade(text, prompt.answer) for text in responses]
        right += sum(grades) / k
        best += any(grades)
        distinct = distinct_4grams(responses)
        if distinct is not None:
            dist_sum, dist_count = dist_sum + distinct, dist_count + 1
    sums = [right, best, dist_sum, dist_count, len(mine), len(rollouts)]
    sums += [sum(len(r.response_ids) for r in rollouts), sum(r.truncated for r in rollouts)]
    right, best, dist_sum, dist_count, n, n_rollouts, tokens, truncated = (
        distributed.sum_over_ranks(sums, engine.device)
    )
    return EvalResult(
        avg=right / n,
        best=best / n,
        dist_4g=dist_sum / dist_count if dist_count else None,
        length=tokens / n_rollouts,
        truncated=truncated / n_rollouts,
        samples=k,
    )

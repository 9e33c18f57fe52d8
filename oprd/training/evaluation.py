"""Evaluation of sampled responses: Avg@k, Best@k, Dist-4g and length."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from oprd import distributed
from oprd.config import EvalConfig
from oprd.data.prompts import Prompt
from oprd.engines.base import Engine
from oprd.observability.summary import EvalResult
from oprd.training.grading import GRADERS


def distinct_4grams(responses: Sequence[str]) -> float | None:
    """Return Dist-4g: 100 * distinct 4-grams / all 4-grams, pooled over ``responses``.

    4-grams are of words separated by white space. Returns None if there are none.
    """
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
    """Sample ``cfg.samples`` responses to every prompt and grade them.

    Each rank evaluates a part of the prompts. Sampling uses its own random state, seeded by
    ``seed``, so that an evaluation does not change the training run.

    Args:
        engine: an engine that samples from the evaluated model.
        tokenizer: the evaluated model's tokenizer.

    Returns:
        The results over the prompts of all ranks.
    """
    k, grade = cfg.samples, GRADERS[cfg.grader]
    mine = prompts[distributed.rank() :: distributed.world_size()]
    rollouts = engine.sample(
        [p.token_ids for p in mine for _ in range(k)],
        cfg.sampling,
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

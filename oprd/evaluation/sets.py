"""Evaluation sets by name, and the layouts in which others publish theirs."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from oprd.config import DataConfig, PromptsConfig
from oprd.data import reasoning_gym
from oprd.data.prompts import PromptSet, load_prompts, load_rows
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.trained import Trained, common

logger = logging.getLogger(__name__)

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

PROMPT_FIELDS = ("prompt", "problem", "question", "Problem", "Question", "messages")
ANSWER_FIELDS = (
    *("reward_model.ground_truth", "answer", "final_answer", "expected_answer"),
    *("ground_truth", "Answer", "solution"),
)
"""Fields of published data sets, those that are tried first first."""


@dataclass(frozen=True)
class EvalSet:
    """A set of problems.

    Attributes:
        name: its name in files and tables.
        source: where the rows are, and their fields.
        suffix: what is appended to each prompt, unless it is there already.
        grader: ``exact`` or ``math``; None: the set has no answers.
    """

    name: str
    source: PromptsConfig
    suffix: str = BOXED
    grader: Literal["exact", "math"] | None = "math"


BUILT_IN = {
    "aime24": PromptsConfig("HuggingFaceH4/aime_2024", prompt_field="problem"),
    "aime25": PromptsConfig("math-ai/aime25", split="test", prompt_field="problem"),
    "aimo": PromptsConfig("AI-MO/aimo-validation-amc", prompt_field="problem"),
    "math500": PromptsConfig("HuggingFaceH4/MATH-500", split="test", prompt_field="problem"),
    "gsm8k": PromptsConfig("openai/gsm8k", subset="main", split="test", prompt_field="question"),
}
DEMO = EvalSet("demo", PromptsConfig("demo:test.jsonl"), suffix="", grader="exact")


def find_sets(cfg: EvalRunConfig, runs: Sequence[Trained] = ()) -> list[EvalSet]:
    """Return the sets that a configuration names.

    Args:
        runs: the runs among the models, whose evaluation sets are known by name, and are read and
            graded as there.

    Raises:
        ConfigError: for an unknown name, two sets of one name, a file whose layout is not known, or
            runs that read or grade a set in different ways.
    """
    sets = [_of_runs(text, cfg, runs) or _as_trained(_find(text), cfg, runs) for text in cfg.sets]
    for name, source in cfg.own_sets.items():
        own = _with_fields(EvalSet(name, source), guess=source == PromptsConfig(source.path))
        sets.append(_as_trained(own, cfg, runs))
    names = [s.name for s in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"several sets are called {', '.join(twice)}: give them names with own_sets, as in "
            "--own_sets '{NAME: {path: FILE}}'"
        )
    return [_adjusted(s, cfg) for s in sets]


def _of_runs(text: str, cfg: EvalRunConfig, runs: Sequence[Trained]) -> EvalSet | None:
    """Return the set if it is one that runs were evaluated on."""
    having = [run for run in runs if run.find(text) is not None]
    if not having:
        return None
    name, source = common(having, "own_sets", lambda run: run.find(text) or ("", PromptsConfig("")))
    given, suffix = cfg.grader, cfg.prompt_suffix
    grader = common(having, "grader", lambda run: run.grader) if given == "auto" else given
    if suffix is None:
        suffix = common(having, "prompt_suffix", lambda run: run.prompt_suffix)
    logger.info(f"{text} is read and graded as {name} by {having[0].run}: grader={grader}")
    return EvalSet(name, source, suffix, grader)


def _as_trained(found: EvalSet, cfg: EvalRunConfig, runs: Sequence[Trained]) -> EvalSet:
    """Return a set that asks for a box with the runs' way of asking, if they have one."""
    if cfg.prompt_suffix is not None or not runs or not found.suffix:
        return found
    return replace(found, suffix=common(runs, "prompt_suffix", _suffix) or found.suffix)


def _suffix(run: Trained) -> str:
    return run.prompt_suffix


def _adjusted(found: EvalSet, cfg: EvalRunConfig) -> EvalSet:
    """Return a set with the options that hold for all sets."""
    if cfg.limit is not None:
        found = replace(found, source=replace(found.source, limit=cfg.limit))
    if cfg.prompt_suffix is not None:
        found = replace(found, suffix=cfg.prompt_suffix)
    if cfg.grader != "auto" and found.grader is not None:
        found = replace(found, grader=cfg.grader)
    return found


def _find(text: str) -> EvalSet:
    key = text.lower().replace("-", "").replace("_", "")
    if key in BUILT_IN:
        return EvalSet(key, BUILT_IN[key])
    if key == "demo":
        return DEMO
    source = PromptsConfig(text)
    if text.startswith("demo:"):
        return EvalSet(Path(text.removeprefix("demo:")).stem, source, suffix="", grader="exact")
    if reasoning_gym.is_task(text):
        return EvalSet(text.removeprefix(reasoning_gym.PREFIX).partition("?")[0], source, suffix="")
    if not Path(text).exists() and "/" not in text and not any(c in text for c in "*?."):
        known = [*BUILT_IN, "demo"]
        near = difflib.get_close_matches(key, known, n=1)
        raise ConfigError(
            f"no set is called {text!r}{f': did you mean {near[0]}?' if near else '.'} Known are "
            f"{', '.join(known)}; others are given as a file, a hub data set (OWNER/NAME) or "
            "reasoning_gym:TASK"
        )
    name = Path(text).name.partition(".")[0].strip("*?") or Path(text).parent.name
    return _with_fields(EvalSet(name, source), guess=True)


def _with_fields(found: EvalSet, guess: bool) -> EvalSet:
    """Return a set with the fields of its first row, and no grader if there is no answer.

    Args:
        guess: whether the fields may be others than the source says.

    Raises:
        ConfigError: if there is no prompt in the row. The message lists the fields that it has.
    """
    if reasoning_gym.is_task(found.source.path):
        return replace(found, suffix="")
    rows, place = load_rows(replace(found.source, limit=1))
    row = rows[0]
    prompts = PROMPT_FIELDS if guess else (found.source.prompt_field,)
    answers = ANSWER_FIELDS if guess else (found.source.answer_field,)
    prompt, answer = _first(row, prompts), _first(row, answers)
    if prompt is None:
        raise ConfigError(
            f"{place(0)}: no field with the prompt ({', '.join(prompts)}); it has "
            f"{', '.join(row)}. Name it: --own_sets '{{NAME: {{path: {found.source.path}, "
            "prompt_field: .., answer_field: ..}}'"
        )
    source = replace(
        found.source, prompt_field=prompt, answer_field=answer or found.source.answer_field
    )
    return replace(found, source=source, grader=None if answer is None else found.grader)


def _first(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return the first name of a field that a row has, in which dots select nested fields."""
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return name
    return None


def read_set(found: EvalSet, cfg: EvalRunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Load a set in a model's tokens.

    Raises:
        ConfigError: if it can't be loaded, or if a row lacks a field.
    """
    template = cfg.chat_template
    if template is None:
        template = "always" if tokenizer.chat_template else "never"
    data = DataConfig(
        chat_template=template,
        chat_template_kwargs=cfg.chat_template_kwargs or {},
        prompt_suffix=found.suffix,
        max_prompt_tokens=2**31,
    )
    answers = found.grader is not None
    return load_prompts(found.source, data, tokenizer, for_evaluation=answers)

"""Prompts, for training and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config.sampling import SamplingParams
from oprd.errors import Problems


@dataclass
class PromptsConfig:
    """A set of prompts, with answers where they are to be graded.

    Attributes:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, a hub data set, or ``demo:NAME.jsonl``.
        split: of a hub data set.
        prompt_field: plain text or a list of chat messages. Dots reach into nested fields.
        answer_field: the reference answer; needed by the sets that are evaluated.
        teacher_prompt: what the teacher reads instead, for privileged information: text in which
            ``{prompt}`` is the prompt (of a chat, its last user message) and ``{name}`` any field
            of the row. Null: the prompt.
        source_field: a field that names each prompt's source, for ``teachers``; null: the set's
            name.
        limit: use the first so many rows; null: all.
    """

    path: str
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    teacher_prompt: str | None = None
    source_field: str | None = None
    limit: int | None = None


@dataclass
class DataConfig:
    """Training prompts, and how any prompt is put to the models.

    Attributes:
        train: the prompts that rollouts are made from.
        sources: several sets instead of ``train``, by name; prompts are drawn from all of them
            together.
        chat_template: ``auto``: apply the tokenizer's chat template to chat messages and leave
            plain text as it is; ``always``: plain text becomes a user's message; ``never``.
        chat_template_kwargs: passed to the chat template, e.g. ``{enable_thinking: false}``.
        prompt_suffix: appended to the text, or to the last user message, that lacks it.
        max_prompt_tokens: longer prompts are treated as ``overlong`` says,
        max_teacher_prompt_tokens: as are those whose ``teacher_prompt`` is longer than this; null:
            the same limit.
        overlong: ``drop`` (and count) or ``error``.
    """

    train: PromptsConfig = field(default_factory=lambda: PromptsConfig("demo:train.jsonl"))
    sources: dict[str, PromptsConfig] = field(default_factory=dict)
    chat_template: Literal["auto", "always", "never"] = "auto"
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    prompt_suffix: str = ""
    max_prompt_tokens: int = 8
    max_teacher_prompt_tokens: int | None = None
    overlong: Literal["drop", "error"] = "drop"

    @property
    def training_sets(self) -> dict[str, PromptsConfig]:
        """By name."""
        return self.sources or {"train": self.train}

    @property
    def teacher_prompt_limit(self) -> int:
        """Tokens."""
        return self.max_teacher_prompt_tokens or self.max_prompt_tokens

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
        problems.need_at_least_one(
            {
                "data.max_prompt_tokens": self.max_prompt_tokens,
                "data.max_teacher_prompt_tokens": self.max_teacher_prompt_tokens,
                "data.train.limit": self.train.limit,
            }
            | {f"data.sources.{name}.limit": s.limit for name, s in self.sources.items()}
        )
        problems.need(
            not self.sources or self.train == DataConfig().train,
            "both data.train and data.sources are given: leave one of them out",
        )


@dataclass
class EvalSetConfig(PromptsConfig):
    """A set to evaluate on.

    Attributes:
        every: steps between evaluations during training; 0: only before and after.
    """

    every: int = 0


def _demo_sets() -> dict[str, EvalSetConfig]:
    return {
        "val": EvalSetConfig("demo:val.jsonl", every=20),
        "test": EvalSetConfig("demo:test.jsonl"),
    }


@dataclass
class EvalConfig:
    """Accuracy on held-out prompts, of the teacher, the student before, during and after.

    Attributes:
        sets: by name. The last one is what the closing table is about.
        grader: ``exact`` (the text) or ``math`` (mathematical equality of the last boxed answer).
        samples: k responses a prompt; accuracy is avg@k.
        temperature: 0: greedy (then samples must be 1).
        top_p, max_new_tokens: of the sampling.
        batch_size: sequences generated at once. (vLLM, for a student, decides for itself.)
        teacher: evaluate the teacher too. The whole model is loaded for that.
    """

    sets: dict[str, EvalSetConfig] = field(default_factory=_demo_sets)
    grader: Literal["exact", "math"] = "exact"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 5
    batch_size: int = 500
    teacher: bool = True

    @property
    def sampling(self) -> SamplingParams:
        """The sampling alone."""
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_p)

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
        need = problems.need
        problems.need_at_least_one(
            {
                "eval.samples": self.samples,
                "eval.max_new_tokens": self.max_new_tokens,
                "eval.batch_size": self.batch_size,
            }
            | {f"eval.sets.{name}.limit": s.limit for name, s in self.sets.items()}
        )
        for name, source in self.sets.items():
            need(
                source.every >= 0,
                f"eval.sets.{name}.every must not be negative, got {source.every}",
            )
        need(0 < self.top_p <= 1, f"eval.top_p must lie in (0, 1], got {self.top_p}")
        need(
            self.temperature >= 0,
            f"eval.temperature must not be negative, got {self.temperature}",
        )
        need(
            self.temperature > 0 or self.samples == 1,
            f"eval.samples is {self.samples} at eval.temperature 0: greedy samples are all the "
            "same",
        )

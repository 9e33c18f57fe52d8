"""Options for the prompts of training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.config.sampling import SamplingParams
from oprd.errors import Problems


@dataclass
class PromptsConfig:
    """A set of prompts, with reference answers if responses are graded.

    Attributes:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file (also ``.jsonl.gz`` or ``.zst``), a
            directory or a pattern (``shards/*.parquet``) of such files, a hub data set,
            ``demo:NAME.jsonl``, or a task of reasoning-gym with its own grader
            (``reasoning_gym:chain_sum?min_terms=3``, see `oprd.data.reasoning_gym`).
        subset: configuration of a hub data set that has several.
        split: split of a hub data set.
        revision: branch, tag or commit of a hub data set; null: the newest.
        streaming: read the first ``limit`` rows of a hub data set without downloading the rest.
        prompt_field: field with the prompt, as plain text or a list of chat messages, or the JSON
            of one. Messages of the assistant at the end, the answer in data for fine-tuning, are
            left out. Dots select nested fields.
        answer_field: field with the reference answer; required in evaluation sets. Of a worked
            solution that ends in ``#### 72``, as in GSM8K, the answer is 72.
        teacher_prompt: template of the prompt that the teacher reads, to give it privileged
            information. ``{prompt}`` stands for the prompt (of a chat, the last user message) and
            ``{name}`` for any field of the row, ``{{`` and ``}}`` for braces. Null: the teacher
            reads the student's prompt.
        source_field: field with the name of each prompt's source, which selects one of
            ``teachers``. Null: the source is the name of the set.
        limit: number of rows to use, from the first; null: all, or 500 questions of reasoning-gym.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    teacher_prompt: str | None = None
    source_field: str | None = None
    limit: int | None = None

    def check(self, problems: Problems, where: str) -> None:
        """Add a problem for every value that is out of range; ``where`` names the set."""
        problems.need_at_least_one({f"{where}.limit": self.limit})
        problems.need(
            not self.streaming or self.limit is not None,
            f"{where}.streaming needs a limit, the number of rows to read: set {where}.limit",
        )


@dataclass
class DataConfig:
    """The training prompts, and the formatting of all prompts.

    Attributes:
        train: the set of training prompts.
        sources: several sets of training prompts by name, instead of ``train``. Prompts are drawn
            from their union.
        chat_template: ``auto``: apply the tokenizer's chat template to chat messages and leave
            plain text unchanged. ``always``: also apply it to plain text, as a user message.
            ``never``: do not use chat templates.
        chat_template_kwargs: arguments of the chat template, e.g. ``{enable_thinking: false}``.
        prompt_suffix: text that is appended to a plain-text prompt or to the last user message,
            unless it is there already.
        max_prompt_tokens: maximum length of a prompt in tokens; ``overlong`` applies to longer
            ones.
        max_teacher_prompt_tokens: maximum length of a teacher's prompt in tokens, if there is a
            ``teacher_prompt``; null: ``max_prompt_tokens``.
        overlong: what to do with prompts that are too long: ``drop`` them and report their number,
            or ``error``.
    """

    train: PromptsConfig = field(default_factory=lambda: PromptsConfig("demo:train.jsonl"))
    sources: dict[str, PromptsConfig] = field(default_factory=dict)
    chat_template: Literal["auto", "always", "never"] = "auto"
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    prompt_suffix: str = ""
    max_prompt_tokens: int = 2048
    max_teacher_prompt_tokens: int | None = None
    overlong: Literal["drop", "error"] = "drop"

    @property
    def training_sets(self) -> dict[str, PromptsConfig]:
        """The sets of training prompts by name."""
        return self.sources or {"train": self.train}

    @property
    def teacher_prompt_limit(self) -> int:
        """The maximum length of a teacher's prompt in tokens."""
        return self.max_teacher_prompt_tokens or self.max_prompt_tokens

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
        problems.need_at_least_one(
            {
                "data.max_prompt_tokens": self.max_prompt_tokens,
                "data.max_teacher_prompt_tokens": self.max_teacher_prompt_tokens,
            }
        )
        self.train.check(problems, "data.train")
        for name, source in self.sources.items():
            source.check(problems, f"data.sources.{name}")
        problems.need(
            not self.sources or self.train == DataConfig().train,
            "both data.train and data.sources are given: leave one of them out",
        )


@dataclass
class EvalSetConfig(PromptsConfig):
    """An evaluation set.

    Attributes:
        every: number of steps between evaluations during training. 0: evaluate only before and
            after training.
    """

    every: int = 0


@dataclass
class EvalConfig:
    """Accuracy of the teacher, and of the student before, during and after training.

    Attributes:
        sets: the evaluation sets by name; none: nothing is evaluated. The table at the end of a run
            shows the last one.
        grader: ``exact`` (equal text) or ``math`` (mathematical equality of the last boxed answer).
        samples: k, the number of responses to each prompt; accuracy is avg@k.
        temperature: sampling temperature. 0: greedy decoding, for which ``samples`` must be 1.
        top_p: nucleus sampling probability.
        max_new_tokens: maximum length of a response in tokens. The default is lowered to what the
            models' contexts leave.
        batch_size: number of sequences generated at once. The vLLM engine, which can evaluate the
            student, chooses its own batches.
        before: evaluate the student before training too.
        teacher: evaluate the teacher too. This loads the whole teacher.
        keep_samples: write every prompt, response and grade to ``samples/`` of the run's directory.
    """

    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    grader: Literal["exact", "math"] = "exact"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 4096
    batch_size: int = 64
    before: bool = True
    teacher: bool = True
    keep_samples: bool = True

    @property
    def sampling(self) -> SamplingParams:
        """The sampling parameters."""
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_p)

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
        need = problems.need
        problems.need_at_least_one(
            {
                "eval.samples": self.samples,
                "eval.max_new_tokens": self.max_new_tokens,
                "eval.batch_size": self.batch_size,
            }
        )
        for name, source in self.sets.items():
            source.check(problems, f"eval.sets.{name}")
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

"""Loading of prompts from JSONL, parquet or the hub, and their encoding to token ids."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from oprd.config import DataConfig, PromptsConfig
from oprd.data.chat import (
    as_question,
    encode_prompt,
    end_of_turn,
    texts_of,
    uses_template,
)
from oprd.data.rows import load_rows
from oprd.errors import ConfigError
from oprd.tokenizers.lost_characters import LossCount

Tokenizers = Mapping[str, PreTrainedTokenizerBase]
NO_TOKENIZERS: Tokenizers = MappingProxyType({})


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt, ready for generation.

    Attributes:
        token_ids: the prompt in the student's tokens.
        answer: the reference answer; None in training.
        source: the prompt's source, by which its teacher is chosen
            (`oprd.config.TrainConfig.teachers`).
        teacher_ids: the prompt that the teacher reads, in its own tokens. None: ``token_ids``.
        teacher_end_id: the token that ends the teacher's turn, if the teacher has another
            tokenizer.
    """

    token_ids: list[int]
    answer: str | None
    source: str = ""
    teacher_ids: list[int] | None = None
    teacher_end_id: int | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one `PromptsConfig`.

    Attributes:
        prompts: the prompts that were kept.
        dropped: number of prompts dropped because they are too long.
        repeated: number of prompts dropped because they are duplicates.
        plain: number of prompts that the student reads as plain text, without a chat template.
        lost: a message about characters that a tokenizer does not know, for each such tokenizer.
    """

    prompts: list[Prompt]
    dropped: int
    repeated: int
    plain: int = 0
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)


def get_field(row: dict[str, Any], name: str, where: str) -> Any:
    """Return ``row["a"]["b"]`` for the name "a.b".

    Raises:
        ConfigError: if the row has no such field. The message lists the fields that it has.
    """
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            has = sorted(k for k, v in row.items() if v is not None)
            raise ConfigError(f"{where}: no field {name!r}; it has {', '.join(has) or 'none'}")
        value = value[part]
    return value


FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")
"""A field in a template, or an escaped brace."""


def privileged(prompt: Any, template: str, row: dict[str, Any], where: str) -> Any:
    """Build the teacher's prompt from ``template``.

    ``{prompt}`` in the template is replaced by the text of the prompt, or of the last user message
    of a chat. Any other ``{name}`` is replaced by that field of the row. Doubled braces stand for
    single ones: ``\\boxed{{x}}``.

    Raises:
        ConfigError: if the row lacks a field that the template names, or if a chat has no user
            message.
    """

    def fill(text: str) -> str:
        def value(match: re.Match) -> str:
            name = match.group(1)
            if name is None:
                return match.group()[0]
            return text if name == "prompt" else str(get_field(row, name, where))

        return FIELD.sub(value, template)

    if isinstance(prompt, str):
        return fill(prompt)
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if last is None:
        raise ConfigError(f"{where}: the chat has no user message, which teacher_prompt needs")
    message = prompt[last] | {"content": fill(prompt[last]["content"])}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def load_prompts(
    source: PromptsConfig,
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    for_evaluation: bool = False,
    name: str = "",
    teacher_tokenizers: Tokenizers = NO_TOKENIZERS,
) -> PromptSet:
    """Load and tokenise a set of prompts.

    Args:
        source: where the prompts are, and the names of their fields.
        cfg: chat template, suffix, length limits, and what to do with longer prompts.
        tokenizer: the student's tokenizer.
        for_evaluation: if True, every row needs an answer, and duplicates are kept. If False (for
            training), duplicates are dropped (DAPO-Math-17k is published with 100 copies of each
            prompt).
        name: the source of the prompts, unless ``source.source_field`` gives one for each row.
        teacher_tokenizers: the tokenizers of teachers that do not share the student's, by source
            ("": for every source). These teachers' prompts are encoded with them, and with their
            chat templates.

    Raises:
        ConfigError: if the prompts can't be loaded or encoded. The message names file and line.
    """
    rows, place = load_rows(source, for_evaluation)
    reader = _Reader(source, cfg, tokenizer, for_evaluation, name, teacher_tokenizers)
    read = [reader.read(row, place(index)) for index, row in enumerate(rows)]
    prompts = [prompt for prompt in read if isinstance(prompt, Prompt)]
    dropped = read.count(_LeftOut.TOO_LONG)
    if not prompts:
        raise ConfigError(
            f"all {dropped} prompts of {source.path} are longer than data.max_prompt_tokens="
            f"{cfg.max_prompt_tokens}, or their teacher's prompts are longer than "
            f"{cfg.teacher_prompt_limit} tokens. Raise data.max_prompt_tokens or "
            "data.max_teacher_prompt_tokens"
        )
    repeated = read.count(_LeftOut.REPEATED)
    return PromptSet(prompts, dropped, repeated, reader.plain, reader.lost)


def final_answer(text: str) -> str:
    """Return the reference answer: of GSM8K's worked solutions what stands behind ``####``."""
    return text.rpartition("####")[2].strip() if "####" in text else text


def _parsed(prompt: Any) -> Any:
    """Return the chat of a prompt that is stored as its JSON; any other prompt unchanged."""
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        with contextlib.suppress(json.JSONDecodeError):
            chat = json.loads(prompt)
            if all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in chat):
                return chat
    return prompt


class _LeftOut(Enum):
    """Why a row gives no prompt."""

    REPEATED = auto()
    TOO_LONG = auto()


class _Reader:
    """Reads the rows of a data set, one after the other. The arguments are `load_prompts`'s."""

    def __init__(
        self,
        source: PromptsConfig,
        cfg: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        for_evaluation: bool,
        name: str,
        teacher_tokenizers: Tokenizers,
    ) -> None:
        self.source, self.cfg, self.tokenizer = source, cfg, tokenizer
        self.for_evaluation, self.name = for_evaluation, name
        self.teacher_tokenizers = teacher_tokenizers
        self.turn_ends = {
            key: end_of_turn(tokenizer, **cfg.chat_template_kwargs)
            for key, tokenizer in teacher_tokenizers.items()
        }
        self.seen: set[str] = set()
        self.plain = 0
        self.own_losses = LossCount(tokenizer, "prompts")
        keys = {"": tokenizer} | dict(teacher_tokenizers)
        self.losses = {key: LossCount(t, "teacher's prompts") for key, t in keys.items()}

    @property
    def lost(self) -> tuple[str, ...]:
        """`PromptSet.lost` of what was read."""
        found = (loss.message for loss in (self.own_losses, *self.losses.values()))
        return tuple(dict.fromkeys(message for message in found if message))

    def read(self, row: dict[str, Any], where: str) -> Prompt | _LeftOut:
        """Turn a row into a prompt, or say why it is left out.

        Args:
            where: file and line of the row, for error messages.

        Raises:
            ConfigError: see `load_prompts`.
        """
        prompt = _parsed(get_field(row, self.source.prompt_field, where))
        if not self.for_evaluation and self._is_repeated(prompt):
            return _LeftOut.REPEATED
        if isinstance(prompt, list):
            prompt = as_question(prompt, where)
        token_ids = encode_prompt(prompt, self.tokenizer, self.cfg, where)
        self.own_losses.add(texts_of(prompt, self.cfg), where)
        if not token_ids:
            raise ConfigError(f"{where}: the prompt has no tokens")
        answer = None
        if self.for_evaluation:
            answer = final_answer(str(get_field(row, self.source.answer_field, where)))
        source_name = self.name
        if self.source.source_field is not None:
            source_name = str(get_field(row, self.source.source_field, where))
        teacher_ids, teacher_end_id = self._for_teacher(prompt, source_name, row, where)
        if self._are_too_long(token_ids, teacher_ids, where):
            return _LeftOut.TOO_LONG
        self.plain += not uses_template(prompt, self.cfg)
        return Prompt(token_ids, answer, source_name, teacher_ids, teacher_end_id)

    def _is_repeated(self, prompt: Any) -> bool:
        """Return whether an earlier row has the same prompt, and remember this one."""
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        if text in self.seen:
            return True
        self.seen.add(text)
        return False

    def _for_teacher(
        self, prompt: Any, source_name: str, row: dict[str, Any], where: str
    ) -> tuple[list[int] | None, int | None]:
        """Encode what the teacher reads: `Prompt.teacher_ids` and `Prompt.teacher_end_id`."""
        key = source_name if source_name in self.teacher_tokenizers else ""
        own_tokenizer = self.teacher_tokenizers.get(key)
        template = self.source.teacher_prompt
        if template is None and own_tokenizer is None:
            return None, None
        to_read = prompt if template is None else privileged(prompt, template, row, where)
        ids = encode_prompt(to_read, own_tokenizer or self.tokenizer, self.cfg, where, "teacher")
        self.losses[key].add(texts_of(to_read, self.cfg), where)
        if own_tokenizer is None:
            return ids, None
        if uses_template(prompt, self.cfg):
            return ids, self.turn_ends[key]
        return ids, own_tokenizer.eos_token_id

    def _are_too_long(
        self, token_ids: list[int], teacher_ids: list[int] | None, where: str
    ) -> bool:
        """Return whether the student's or the teacher's prompt is too long.

        Raises:
            ConfigError: if one is, and ``data.overlong`` is ``error``.
        """
        cfg = self.cfg
        checks = [("the prompt", token_ids, "max_prompt_tokens", cfg.max_prompt_tokens)]
        if teacher_ids is not None:
            whose, option = "the teacher's prompt", "max_teacher_prompt_tokens"
            checks.append((whose, teacher_ids, option, cfg.teacher_prompt_limit))
        for what, ids, option, limit in checks:
            if len(ids) <= limit:
                continue
            if cfg.overlong == "error":
                raise ConfigError(
                    f"{where}: {what} has {len(ids)} tokens, more than data.{option}={limit}. "
                    f"Raise data.{option}, or set data.overlong=drop"
                )
            return True
        return False


def load_training_prompts(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizers: Tokenizers = NO_TOKENIZERS,
) -> PromptSet:
    """Load the training prompts of all sources.

    Raises:
        ConfigError: see `load_prompts`.
    """
    sets = [
        load_prompts(source, cfg, tokenizer, name=name, teacher_tokenizers=teacher_tokenizers)
        for name, source in cfg.training_sets.items()
    ]
    prompts = [prompt for prompt_set in sets for prompt in prompt_set.prompts]
    return PromptSet(
        prompts,
        sum(s.dropped for s in sets),
        sum(s.repeated for s in sets),
        sum(s.plain for s in sets),
        tuple(message for s in sets for message in s.lost),
    )

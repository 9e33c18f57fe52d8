"""Prompts: from JSONL, parquet or the hub to token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from oprd.config import DataConfig, PromptsConfig
from oprd.data.chat import encode_prompt, end_of_turn, uses_template
from oprd.errors import ConfigError, Unreachable, is_unreachable
from oprd.models.loading import demo_path

Tokenizers = Mapping[str, PreTrainedTokenizerBase]
NO_TOKENIZERS: Tokenizers = MappingProxyType({})
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for generation.

    Attributes:
        source: which `oprd.config.TrainConfig.teachers` are chosen by.
        teacher_ids: what the teacher reads instead, in its own tokens; None: the same.
        teacher_end_id: the token that ends a teacher's turn, if its tokenizer is another.
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
        prompts: what is left.
        dropped: how many were left out for their length.
        repeated: how many were left out for standing there already.
    """

    prompts: list[Prompt]
    dropped: int
    repeated: int

    def __len__(self) -> int:
        return len(self.prompts)


def load_rows(cfg: PromptsConfig) -> tuple[Dataset, Callable[[int], str]]:
    """The rows of a file or hub data set, and a function that says where row i stands.

    Raises:
        ConfigError: naming file and line, for a missing or empty file or a line that isn't JSON.
    """
    path = demo_path(cfg.path)
    suffix = Path(path).suffix
    if suffix in FILE_FORMATS:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"prompt file {path} does not exist")
        lines = _jsonl_lines(file) if suffix == ".jsonl" else None
        try:
            rows = load_dataset(FILE_FORMATS[suffix], data_files=str(file), split="train")
        except Exception as error:
            raise ConfigError(f"{path} can't be read as {suffix[1:]}: {_root(error)}") from error
    elif Path(path).exists():
        raise ConfigError(
            f"{path} is neither a hub data set nor a file ending in {', '.join(FILE_FORMATS)}"
        )
    else:
        lines = None
        try:
            rows = load_dataset(path, split=cfg.split)
        except Exception as error:
            kind = Unreachable if is_unreachable(error) else ConfigError
            raise kind(
                f"data set {path!r} (split {cfg.split!r}) can't be loaded: {_root(error)}. Local "
                f"files must end in {', '.join(FILE_FORMATS)}"
            ) from error
    if cfg.limit is not None:
        rows = rows.select(range(min(cfg.limit, len(rows))))
    if len(rows) == 0:
        raise ConfigError(f"{path} holds no prompts")
    return rows, lambda i: f"{path}:{lines[i]}" if lines else f"{path}, row {i}"


def _root(error: BaseException) -> BaseException:
    """The innermost cause, which `datasets` wraps in errors that say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _jsonl_lines(file: Path) -> list[int]:
    """The line number of every row, each checked to be a JSON object."""
    numbers = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{file}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file}:{number}: expected a JSON object, got {line.strip()}")
            numbers.append(number)
    if not numbers:
        raise ConfigError(f"prompt file {file} is empty")
    return numbers


def get_field(row: dict[str, Any], name: str, where: str) -> Any:
    """``row["a"]["b"]`` for "a.b".

    Raises:
        ConfigError: if it isn't there, with the place and the fields that are.
    """
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            has = sorted(k for k, v in row.items() if v is not None)
            raise ConfigError(f"{where}: no field {name!r}; it has {', '.join(has) or 'none'}")
        value = value[part]
    return value


FIELD = re.compile(r"\{([A-Za-z_][\w.]*)\}")


def privileged(prompt: Any, template: str, row: dict[str, Any], where: str) -> Any:
    """The prompt, text or chat messages, as the teacher reads it: the text (of the last user
    message) put into ``template``, with any other field of the row.

    Raises:
        ConfigError: if the row lacks a field that the template names.
    """

    def fill(text: str) -> str:
        def value(match: re.Match) -> str:
            name = match.group(1)
            return text if name == "prompt" else str(get_field(row, name, where))

        return FIELD.sub(value, template)

    if isinstance(prompt, str):
        return fill(prompt)
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=None)
    if last is None:
        raise ConfigError(f"{where}: a chat without a user's message: teacher_prompt needs one")
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
    """Read and tokenise a set of prompts.

    Args:
        source: which one.
        cfg: chat template, suffix, and what to do with long prompts.
        tokenizer: the student's.
        for_evaluation: then every row needs an answer and counts. In training a prompt that is
            given several times counts once (DAPO-Math-17k is published with 100 copies of each).
        name: the prompts' source, unless their rows say it.
        teacher_tokenizers: by source (or "", for every source), of teachers that do not share the
            student's: their prompts are put through these, and through their chat templates.

    Raises:
        ConfigError: saying where (file and line) and what.
    """
    rows, place = load_rows(source)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    dropped = repeated = 0
    turn_ends = {
        of: end_of_turn(other, **cfg.chat_template_kwargs)
        for of, other in teacher_tokenizers.items()
    }
    for index, row in enumerate(rows):
        where = place(index)
        prompt = get_field(row, source.prompt_field, where)
        if not for_evaluation:
            text = prompt if isinstance(prompt, str) else json.dumps(prompt)
            if text in seen:
                repeated += 1
                continue
            seen.add(text)
        ids = encode_prompt(prompt, tokenizer, cfg, where)
        if not ids:
            raise ConfigError(f"{where}: the prompt has no tokens")
        answer = None
        if for_evaluation:
            answer = str(get_field(row, source.answer_field, where))
        of = name
        if source.source_field is not None:
            of = str(get_field(row, source.source_field, where))
        key = of if of in teacher_tokenizers else ""
        other = teacher_tokenizers.get(key)
        told = end = None
        if source.teacher_prompt is not None or other is not None:
            told = prompt
            if source.teacher_prompt is not None:
                told = privileged(prompt, source.teacher_prompt, row, where)
            told = encode_prompt(told, other or tokenizer, cfg, where, "teacher")
        if other is not None:
            end = turn_ends[key] if uses_template(prompt, cfg) else other.eos_token_id
        if _too_long("the prompt", ids, "max_prompt_tokens", cfg.max_prompt_tokens, cfg, where) or (
            told is not None
            and _too_long(
                "the teacher's prompt", told, "max_teacher_prompt_tokens",
                cfg.teacher_prompt_limit, cfg, where,
            )
        ):  # fmt: skip
            dropped += 1
            continue
        prompts.append(Prompt(ids, answer, of, told, end))
    if not prompts:
        raise ConfigError(
            f"all {dropped} prompts of {source.path} are longer than data.max_prompt_tokens="
            f"{cfg.max_prompt_tokens} (or, the teacher's, {cfg.teacher_prompt_limit}): raise it"
        )
    return PromptSet(prompts, dropped, repeated)


def _too_long(
    what: str, ids: list[int], option: str, limit: int, cfg: DataConfig, where: str
) -> bool:
    if len(ids) > limit and cfg.overlong == "error":
        raise ConfigError(
            f"{where}: {what} has {len(ids)} tokens, more than data.{option}={limit}: raise it, or "
            "set data.overlong=drop"
        )
    return len(ids) > limit


def load_training_prompts(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizers: Tokenizers = NO_TOKENIZERS,
) -> PromptSet:
    """The prompts of all sources.

    Raises:
        ConfigError: as `load_prompts`.
    """
    sets = [
        load_prompts(source, cfg, tokenizer, name=name, teacher_tokenizers=teacher_tokenizers)
        for name, source in cfg.training_sets.items()
    ]
    prompts = [prompt for found in sets for prompt in found.prompts]
    return PromptSet(prompts, sum(s.dropped for s in sets), sum(s.repeated for s in sets))

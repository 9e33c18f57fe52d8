"""Prompts: from JSONL, parquet or the hub to token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from oprd.alignment import end_of_turn
from oprd.config import DataConfig, PromptsConfig
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


def with_suffix(prompt: Any, suffix: str) -> Any:
    """The prompt, text or chat messages, with ``suffix`` at the end of its text or of its last
    user message, unless it is there already, be it with the doubled braces of a published set
    (``\\boxed{{}}``)."""
    if isinstance(prompt, str):
        text = prompt.rstrip()
        if not suffix or text.replace("{{}}", "{}").endswith(suffix.strip()):
            return prompt
        return f"{text} {suffix}"
    users = [i for i, m in enumerate(prompt) if m["role"] == "user"]
    if not users:
        return prompt
    last = users[-1]
    message = prompt[last] | {"content": with_suffix(prompt[last]["content"], suffix)}
    return [*prompt[:last], message, *prompt[last + 1 :]]


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


def encode_prompt(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    where: str,
    who: str = "student",
) -> list[int]:
    """Token ids of a prompt, through the chat template where ``cfg`` asks for that.

    Raises:
        ConfigError: for something that is no prompt, or a tokenizer without a chat template.
    """
    is_chat = isinstance(prompt, list)
    if is_chat and not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise ConfigError(f"{where}: a chat prompt is a list of {{role, content}}, got {prompt!r}")
    if not is_chat and not isinstance(prompt, str):
        raise ConfigError(f"{where}: a prompt is text or a list of messages, got {prompt!r}")
    prompt = with_suffix(prompt, cfg.prompt_suffix)
    if is_chat and cfg.chat_template == "never":
        prompt = "\n".join(m["content"] for m in prompt)
    elif not is_chat and cfg.chat_template == "always":
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}: the prompt is a chat, but the {who}'s tokenizer has no chat template: use "
            "a tokenizer that has one, or data.chat_template=never"
        )
    return tokenizer.apply_chat_template(
        prompt,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **cfg.chat_template_kwargs,
    )["input_ids"]


def uses_template(prompt: Any, cfg: DataConfig) -> bool:
    """Whether `encode_prompt` renders this prompt through the chat template."""
    if isinstance(prompt, list):
        return cfg.chat_template != "never"
    return cfg.chat_template == "always"


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


class PromptSampler(Iterator[list[int]]):
    """Endless batches of prompt indices: every epoch a new permutation, a batch may span two.

    Its position is how many were drawn, over all ranks: any number of them can go on from there.
    """

    def __init__(self, num_prompts: int, batch_size: int, seed: int) -> None:
        self.num_prompts, self.batch_size, self.seed = num_prompts, batch_size, seed
        self._generator = torch.Generator().manual_seed(seed)
        self._pool: list[int] = []
        self.drawn = 0

    def __next__(self) -> list[int]:
        while len(self._pool) < self.batch_size:
            self._pool += torch.randperm(self.num_prompts, generator=self._generator).tolist()
        batch, self._pool = self._pool[: self.batch_size], self._pool[self.batch_size :]
        self.drawn += self.batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position, as JSON."""
        return {"drawn": self.drawn, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position.

        Raises:
            ConfigError: if it is one in another sequence of prompts.
        """
        ours = {"num_prompts": self.num_prompts, "seed": self.seed}
        theirs = {name: state[name] for name in ours}
        if ours != theirs:
            raise ConfigError(
                f"the checkpoint's position is in another sequence of prompts: {theirs} there, "
                f"{ours} here: the files that data names have changed. Restore them, or begin in a "
                "new output_dir"
            )
        self._generator.manual_seed(self.seed)
        epochs, position = divmod(state["drawn"], self.num_prompts)
        for _ in range(epochs + 1):  # each permutation follows from the one before
            permutation = torch.randperm(self.num_prompts, generator=self._generator).tolist()
        self._pool, self.drawn = permutation[position:], state["drawn"]

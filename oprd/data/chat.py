"""Encoding of prompts, plain text or chats, to token ids."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from oprd.config import DataConfig
from oprd.errors import ConfigError


def end_of_turn(tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> int:
    """Return the special token that the chat template writes after an assistant's message.

    It (``<|im_end|>``, ``<end_of_turn>``, ..) need not be the EOS token. Return the EOS token if
    the tokenizer has no chat template, or if the template writes no special token there.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    mark = "The answer is four"
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **template_options)
    after = text.rpartition(mark)[2].lstrip() if mark in text else ""
    added = tokenizer.added_tokens_decoder.items()
    ends = [(t.content, i) for i, t in added if t.special and after.startswith(t.content)]
    return max(ends, key=lambda end: len(end[0]))[1] if ends else tokenizer.eos_token_id


def with_suffix(prompt: Any, suffix: str) -> Any:
    """Append ``suffix`` to a text prompt, or to the last user message of a chat.

    A prompt that ends in the suffix already is returned unchanged, also if the suffix has the
    doubled braces of a published data set there (``\\boxed{{}}``).
    """
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


def encode_prompt(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    where: str,
    who: str = "student",
) -> list[int]:
    """Encode a prompt to token ids, through the chat template if ``cfg.chat_template`` says so.

    Args:
        prompt: text, or a list of chat messages.
        where: file and line of the prompt, for error messages.
        who: "student" or "teacher", for error messages.

    Raises:
        ConfigError: if ``prompt`` is neither text nor a chat, or if the chat template is needed
            and the tokenizer has none, or refuses the chat.
    """
    if not isinstance(prompt, str | list):
        raise ConfigError(f"{where}: a prompt is text or a list of messages, got {prompt!r}")
    is_chat = isinstance(prompt, list)
    if isinstance(prompt, list):
        prompt = as_question(prompt, where)
    prompt = with_suffix(prompt, cfg.prompt_suffix)
    if is_chat and cfg.chat_template == "never":
        prompt = "\n".join(m["content"] for m in prompt)
    elif not is_chat and cfg.chat_template == "always":
        prompt = [{"role": "user", "content": prompt}]
    for text in [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(
                f"{where}: the prompt holds half of a surrogate pair, which is no character: "
                "repair the file, it was cut or converted wrongly"
            )
    if isinstance(prompt, str):
        return plain_ids(prompt, tokenizer)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}: the prompt is a chat, but the {who}'s tokenizer has no chat template: use "
            "a tokenizer that has one, or data.chat_template=never"
        )
    try:
        return tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **cfg.chat_template_kwargs,
        )["input_ids"]
    except jinja2.TemplateError as error:
        roles = ", ".join(m["role"] for m in prompt)
        raise ConfigError(
            f"{where}: the {who}'s chat template refuses this chat of {roles}: {error}"
        ) from error


def texts_of(prompt: Any, cfg: DataConfig) -> list[str]:
    """Return the texts of a prompt that `encode_prompt` accepts: one, or those of its messages."""
    prompt = with_suffix(prompt, cfg.prompt_suffix)
    return [prompt] if isinstance(prompt, str) else [str(m["content"]) for m in prompt]


def as_question(chat: list[Any], where: str) -> list[dict[str, str]]:
    """Return the messages of a chat up to the last one that is not the assistant's.

    Chat data for fine-tuning ends with the answer. Contents that are lists of text parts are
    joined.

    Raises:
        ConfigError: for anything else than a list of messages with roles and text, one of them not
            the assistant's.
    """
    messages = []
    for number, message in enumerate(chat):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(
                f"{where}: a chat prompt is a list of {{role, content}}, got {message!r} as "
                f"message {number}"
            )
        messages.append(message | {"content": _text_of(message["content"], where, number)})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ConfigError(f"{where}: the chat has no message to answer: {chat!r}")
    return messages


def _text_of(content: Any, where: str, number: int) -> str:
    if isinstance(content, str):
        return content
    found = repr(content)
    if isinstance(content, list) and content and all(isinstance(p, dict) for p in content):
        other = [p.get("type") for p in content if p.get("type") != "text"]
        if not other:
            return "".join(str(p.get("text") or "") for p in content)
        found = f"a part of type {other[0]!r}"
    raise ConfigError(f"{where}: message {number} of the chat must be text, got {found}")


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode plain text that a response is to follow.

    A BOS token that the tokenizer adds is kept, unless the text begins with it already. What it
    adds at the end, an EOS token, is left out.
    """
    ids = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not bare:
        return ids
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            added = ids[:start]
            return bare if added and bare[: len(added)] == added else added + bare
    return ids


def uses_template(prompt: Any, cfg: DataConfig) -> bool:
    """Return whether `encode_prompt` renders this prompt through the chat template."""
    if isinstance(prompt, list):
        return cfg.chat_template != "never"
    return cfg.chat_template == "always"

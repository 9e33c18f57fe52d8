"""Encoding of prompts, plain text or chats, to token ids."""

from __future__ import annotations

from typing import Any

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
            and the tokenizer has none.
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
    """Return whether `encode_prompt` renders this prompt through the chat template."""
    if isinstance(prompt, list):
        return cfg.chat_template != "never"
    return cfg.chat_template == "always"

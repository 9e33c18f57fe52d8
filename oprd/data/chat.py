"""Prompts and chats to token ids."""

from __future__ import annotations

from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
)

from oprd.config import DataConfig
from oprd.errors import ConfigError


def end_of_turn(tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> int:
    """The token that its chat template writes after an assistant's message (``<|im_end|>``,
    ``<end_of_turn>``, ..), which need not be EOS. Without a template, or a special token there:
    EOS."""
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    mark = "The answer is four"
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **template_options)
    after = text.rpartition(mark)[2].lstrip() if mark in text else ""
    added = tokenizer.added_tokens_decoder.items()
    found = [(t.content, i) for i, t in added if t.special and after.startswith(t.content)]
    return max(found, key=lambda f: len(f[0]))[1] if found else tokenizer.eos_token_id


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

"""What a tokenizer's tokens spell, byte for byte, read from its tokenizer.json.

`decode` cannot tell: it strips a leading space, drops special tokens and turns the pieces of a
character into replacement characters. The decoder that a tokenizer declares says how each token
becomes bytes. The families it describes:

- byte-level (GPT-2, Qwen, Llama-3, DeepSeek): a character of a token stands for a byte;
- byte-fallback (Llama-2, Gemma, Phi-3): ``▁`` is a space, ``<0xE2>`` is a byte;
- metaspace (T5, Unigram models without byte fallback): ``▁`` is a space;
- plain: tokens are the text, as in a character-level tokenizer.

Everything else (WordPiece, ``</w>`` suffixes, decoders that clean up) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from oprd.errors import ConfigError


def byte_alphabet() -> dict[str, int]:
    """The 256 characters by which byte-level vocabularies write bytes, and the bytes they stand
    for: printable Latin-1 characters stand for themselves, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


ALPHABET = byte_alphabet()
FALLBACK = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


@dataclass(frozen=True)
class Spelling:
    """How a decoder turns a token's name into bytes."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]

    @property
    def family(self) -> str:
        """One of the families above."""
        if self.byte_level:
            return "byte-level"
        if self.byte_fallback:
            return "byte-fallback"
        return "metaspace" if self.replacements else "plain"

    def replace(self, text: str) -> str:
        """Text with the decoder's replacements made (``▁`` to a space)."""
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text

    def spell(self, token: str) -> bytes:
        """The bytes of a token of the vocabulary (not of an added one)."""
        if self.byte_level:
            try:
                return bytes([ALPHABET[c] for c in token])
            except KeyError:  # a name outside the alphabet: the decoder, too, takes it as text
                return token.encode()
        if self.byte_fallback and token in FALLBACK:
            return FALLBACK[token]
        return self.replace(token).encode()


@dataclass(frozen=True)
class TokenBytes:
    """A tokenizer as bytes.

    Attributes:
        spelling: the family's rules.
        table: by token id, the bytes it spells; None for special tokens, unknown-token markers
            and ids without a token.
        special: special tokens by what is written for them, and their ids.
        added: the same for all added tokens, special or not.
        single: ids of the tokens that spell one byte on its own.
        encoder: a copy of the tokenizer that encodes text as the continuation of something: no
            dummy prefix space, no truncation, no padding; and text that spells a special
            token stays text.
    """

    spelling: Spelling
    table: list[bytes | None]
    special: dict[str, int]
    added: dict[str, int]
    single: dict[int, int]
    encoder: Tokenizer

    def spell(self, token: int) -> bytes | None:
        """The bytes of a token id; None as in `table`, or beyond it (a padded embedding row)."""
        return self.table[token] if 0 <= token < len(self.table) else None

    def as_decoded(self, text: str) -> str:
        """What the tokens of ``text`` spell if none is unknown: normalised, and with ``▁``, where
        it is an ordinary character of the text, read back as the space it now stands for."""
        if self.encoder.normalizer is not None:
            text = self.encoder.normalizer.normalize_str(text)
        return self.spelling.replace(text)


def token_bytes(tokenizer: PreTrainedTokenizerBase, who: str = "given") -> TokenBytes:
    """The bytes of every token. Takes up to seconds for a large vocabulary: call it once.

    Args:
        tokenizer: a fast one (with a backend of the `tokenizers` library).
        who: "student", "teacher", for messages.

    Raises:
        ConfigError: for a tokenizer of another kind, by its name.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"the {who} tokenizer ({type(tokenizer).__name__}) has no backend of the `tokenizers` "
            "library, which says what its tokens spell: use one with a tokenizer.json"
        )
    state = json.loads(backend.to_str())
    spelling = _spelling(state, who)
    unknown = _unknown_token(state["model"])
    table: list[bytes | None] = [None] * (max(backend.get_vocab().values(), default=-1) + 1)
    vocab = backend.get_vocab(with_added_tokens=False)
    for name, i in vocab.items():
        table[i] = None if name == unknown else spelling.spell(name)
    single = {b[0]: i for i, b in enumerate(table) if b is not None and len(b) == 1}
    if spelling.byte_fallback:  # "\n" and <0x0A> may both be there: the second is the byte
        single |= {byte[0]: vocab[name] for name, byte in FALLBACK.items() if name in vocab}
    special: dict[str, int] = {}
    added: dict[str, int] = {}
    declared = set(tokenizer.all_special_ids)
    for token in state["added_tokens"]:
        i, content = token["id"], token["content"]
        added[content] = i
        is_special = token["special"] or i in declared
        if is_special:
            table[i] = None
            special[content] = i
        elif content not in vocab:  # Gemma's runs of ▁ are both: there the decoder's rule holds
            table[i] = spelling.replace(content).encode()
    return TokenBytes(spelling, table, special, added, single, _continuation_encoder(state))


def token_byte_spans(
    tokenizer: PreTrainedTokenizerBase | TokenBytes, ids: Sequence[int]
) -> list[tuple[int, int]]:
    """Where each token begins and ends in the bytes that all of them spell.

    A special token, or an id that spells nothing, is an empty span.

    Raises:
        ConfigError: as `token_bytes`.
    """
    known = tokenizer if isinstance(tokenizer, TokenBytes) else token_bytes(tokenizer)
    spans, position = [], 0
    for token in ids:
        end = position + len(known.spell(token) or b"")
        spans.append((position, end))
        position = end
    return spans


def _unknown_token(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _spelling(state: dict[str, Any], who: str) -> Spelling:
    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f"the {who} tokenizer {what}, so the exact bytes of its tokens are not known. Known "
            "are byte-level BPE, BPE or Unigram with ▁ for spaces (with or without byte fallback), "
            "and plain text tokens"
        )

    model = state["model"]
    if model["type"] == "WordPiece":
        raise refuse("is WordPiece, which drops the spaces between words")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise refuse(f"marks pieces of words by {key}={model[key]!r}")
    if state["decoder"] is None:
        raise refuse("has no decoder")
    byte_level = byte_fallback = False
    replacements: list[tuple[str, str]] = []
    decoders = state["decoder"]
    for decoder in decoders["decoders"] if decoders["type"] == "Sequence" else [decoders]:
        match decoder:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Metaspace", "replacement": mark}:
                replacements.append((mark, " "))
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "Fuse"} | {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                pass  # Strip: the dummy prefix of a whole text, which a response does not have
            case _:
                raise refuse(f"has the decoder {json.dumps(decoder)}")
    if byte_level and (byte_fallback or replacements):
        raise refuse("mixes a byte-level decoder with others")
    return Spelling(byte_level, byte_fallback, tuple(replacements))


def _continuation_encoder(state: dict[str, Any]) -> Tokenizer:
    state = state | {
        "normalizer": _without_prefix(state["normalizer"]),
        "pre_tokenizer": _without_prefix(state["pre_tokenizer"]),
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.encode_special_tokens = True
    return encoder


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    match part:
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            kept = [_without_prefix(p) for p in part[key]]
            return part | {key: [p for p in kept if p is not None]}
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
    return part

"""The exact bytes that each token of a tokenizer spells, read from its tokenizer.json.

`decode` does not give these bytes: it strips a leading space, drops special tokens and turns the
pieces of a character into replacement characters. They follow from the decoder that the tokenizer
declares. The supported families are:

- byte-level (GPT-2, Qwen, Llama-3, DeepSeek): each character of a token stands for a byte;
- byte-fallback (Llama-2, Gemma, Phi-3): ``▁`` is a space, ``<0xE2>`` is a byte;
- metaspace (T5, Unigram models without byte fallback): ``▁`` is a space;
- plain: tokens are the text, as in a character-level tokenizer.

All other tokenizers (WordPiece, ``</w>`` suffixes, decoders that clean up) raise an error that
names the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from oprd.errors import ConfigError


def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters that byte-level vocabularies write for bytes, with those bytes.

    Printable Latin-1 characters stand for themselves. The characters from U+0100 onwards stand for
    the other bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


ALPHABET = byte_alphabet()
FALLBACK = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


@dataclass(frozen=True)
class Spelling:
    """The rules by which a decoder turns a token's name into bytes.

    Attributes:
        byte_level: each character of a name stands for a byte.
        byte_fallback: names such as ``<0xE2>`` stand for a byte.
        replacements: (old, new) strings that are replaced in a name, in order.
    """

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]

    @property
    def family(self) -> str:
        """Return the name of the tokenizer's family, as in the module's description."""
        if self.byte_level:
            return "byte-level"
        if self.byte_fallback:
            return "byte-fallback"
        return "metaspace" if self.replacements else "plain"

    def replace(self, text: str) -> str:
        """Return ``text`` with the decoder's replacements applied (``▁`` becomes a space)."""
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text

    def spell(self, token: str) -> bytes:
        """Return the bytes of a token of the vocabulary (not of an added token)."""
        if self.byte_level:
            try:
                return bytes([ALPHABET[c] for c in token])
            except KeyError:  # as the decoder does for a name outside the alphabet
                return token.encode()
        if self.byte_fallback and token in FALLBACK:
            return FALLBACK[token]
        return self.replace(token).encode()


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of all tokens of a tokenizer, and an encoder for continuations.

    Attributes:
        spelling: the rules of the tokenizer's family.
        table: token id -> bytes; None for special tokens, unknown-token markers and ids without a
            token.
        special: content -> id of the special tokens.
        added: content -> id of all added tokens, special or not.
        single: byte -> id of the token that spells just this byte.
        encoder: a copy of the tokenizer that encodes a text as the continuation of another text:
            no dummy prefix space, no truncation, no padding. Text that spells a special token
            stays text.
    """

    spelling: Spelling
    table: list[bytes | None]
    special: dict[str, int]
    added: dict[str, int]
    single: dict[int, int]
    encoder: Tokenizer

    def spell(self, token: int) -> bytes | None:
        """Return the bytes of a token id.

        Return None where `table` has None, and for an id beyond it (a padded embedding row).
        """
        return self.table[token] if 0 <= token < len(self.table) else None

    def as_decoded(self, text: str) -> str:
        """Return what the tokens of ``text`` spell, provided none of them is unknown.

        The text is normalised. The decoder's replacements then apply to the text's own characters
        too: a ``▁`` in the text becomes a space.
        """
        if self.encoder.normalizer is not None:
            text = self.encoder.normalizer.normalize_str(text)
        return self.spelling.replace(text)


def token_bytes(tokenizer: PreTrainedTokenizerBase, who: str = "given") -> TokenBytes:
    """Compute the bytes of every token. A large vocabulary takes up to seconds: call this once.

    Args:
        tokenizer: a fast tokenizer (one with a backend of the `tokenizers` library).
        who: "student's" or "teacher's", for error messages.

    Raises:
        ConfigError: if the tokenizer has no such backend or belongs to no supported family.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"the {who} tokenizer ({type(tokenizer).__name__}) has no backend of the `tokenizers` "
            "library, so the exact bytes of its tokens are not known. Use a tokenizer with a "
            "tokenizer.json"
        )
    state = json.loads(backend.to_str())
    spelling = _spelling(state, who)
    unknown = _unknown_token(state["model"])
    table: list[bytes | None] = [None] * (max(backend.get_vocab().values(), default=-1) + 1)
    vocab = backend.get_vocab(with_added_tokens=False)
    for name, i in vocab.items():
        table[i] = None if name == unknown else spelling.spell(name)
    single = {b[0]: i for i, b in enumerate(table) if b is not None and len(b) == 1}
    if spelling.byte_fallback:  # if both "\n" and <0x0A> exist, <0x0A> is the single byte
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
        elif content not in vocab:  # Gemma's runs of ▁ are in both: the rule above applies to them
            table[i] = spelling.replace(content).encode()
    return TokenBytes(spelling, table, special, added, single, _continuation_encoder(state))


def _unknown_token(model: dict[str, Any]) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _spelling(state: dict[str, Any], who: str) -> Spelling:
    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f"the {who} tokenizer {what}, so the exact bytes of its tokens are not known. "
            "Supported tokenizers are byte-level BPE, BPE or Unigram with ▁ for spaces (with or "
            "without byte fallback), and tokenizers whose tokens are plain text"
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
                pass  # Strip removes the dummy prefix of a whole text; a response has none
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
    """Return a normalizer or pre-tokenizer without the step that puts a space before a text."""
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

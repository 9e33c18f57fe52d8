"""Characters that a tokenizer can not represent.

Byte-level tokenizers and those with byte fallback represent every text. Others read an unknown
character as their unknown token; a BPE without one drops it and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

SHOWN = 8
"""Lost characters that a message names."""
CONTEXT = 24
"""Characters of the example on both sides of a lost one."""


class LostCharacters:
    """Finds the characters of texts that a tokenizer drops or reads as its unknown token.

    What the tokenizer's normalizer and pre-tokenizer remove (accents, white space) is not counted:
    whoever made the tokenizer wanted that.

    Each distinct character is looked up once, so that this costs little beside the encoding itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.backend = backend if isinstance(backend, Tokenizer) else None
        unknown = {tokenizer.unk_token_id, *self._unknown_of_backend()} - {None}
        self.unknown = unknown - {tokenizer.eos_token_id, tokenizer.bos_token_id}
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added))) if added else None
        self.suspicious: dict[str, bool] = {}
        self.lost: dict[str, bool] = {}

    def __call__(self, text: str) -> str:
        """Return the lost characters of a text, each once, in order of appearance."""
        for character in set(text) - self.suspicious.keys():
            self.suspicious[character] = bool(self._lost_of(character))
        if not any(self.suspicious[character] for character in set(text)):
            return ""
        if self.added is not None:
            text = self.added.sub("", text)
        return self._lost_of(text)  # a letter and its accent may be one known character

    def _lost_of(self, text: str) -> str:
        found = dict.fromkeys(c for piece in self._pieces(text) for c in self._in_piece(piece))
        return "".join(found)

    def _pieces(self, text: str) -> list[str]:
        """Return what the tokenizer's model reads, in pieces."""
        if self.backend is None:
            return [text]
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        if self.backend.pre_tokenizer is None:
            return [text]
        return [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]

    def _in_piece(self, piece: str) -> list[str]:
        """Return the lost characters of a piece; all of them if only the whole piece is lost."""
        if self.backend is not None and self.backend.model.token_to_id(piece) is not None:
            return []
        if self.unknown and not self._is_lost(piece):
            return []
        lost = [c for c in piece if self._is_lost(c)]
        return lost or (list(piece) if self.unknown else [])

    def _is_lost(self, text: str) -> bool:
        if text not in self.lost:
            if self.backend is None:
                ids = self.tokenizer.encode(text, add_special_tokens=False)
            else:
                ids = [token.id for token in self.backend.model.tokenize(text)]
            self.lost[text] = not ids or bool(self.unknown & set(ids))
        return self.lost[text]

    def _unknown_of_backend(self) -> list[int | None]:
        name = getattr(self.backend and self.backend.model, "unk_token", None)
        return [] if name is None or self.backend is None else [self.backend.token_to_id(name)]


class LossCount:
    """Counts the prompts of a set that lose characters.

    Attributes:
        what: "prompts" or "teacher's prompts", for the message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
        self.what = what
        self._find = LostCharacters(tokenizer)
        self._all = self._prompts = 0
        self._characters = self._example = ""

    def add(self, texts: Iterable[str], where: str) -> None:
        """Look at the texts of a prompt; ``where`` names its file and line."""
        texts = list(texts)
        self._all += 1
        found = [self._find(text) for text in texts]
        lost = "".join(dict.fromkeys("".join(found)))
        if not lost:
            return
        if not self._prompts:
            text = next(t for t, lost_of in zip(texts, found, strict=True) if lost_of)
            at = min((i for c in lost if (i := text.find(c)) >= 0), default=0)
            self._example = f"{where}, {text[max(at - CONTEXT, 0) : at + CONTEXT]!r}"
        self._prompts += 1
        self._characters = "".join(dict.fromkeys(self._characters + lost))

    @property
    def message(self) -> str:
        """What was lost, in words; empty if nothing was."""
        if not self._prompts:
            return ""
        more = len(self._characters) - SHOWN
        names = ", ".join(map(repr, self._characters[:SHOWN])) + (
            f" and {more} more" if more > 0 else ""
        )
        fate = "reads as its unknown token" if self._find.unknown else "leaves out"
        return (
            f"{self._prompts:,} of {self._all:,} {self.what} have characters that the tokenizer "
            f"does not know and {fate}: {names}. The first is {self._example}. The model does not "
            "see them: spell them otherwise, or use a tokenizer that knows all bytes"
        )

"""Does a teacher's tokenizer give away what the student writes next?

A tokenizer that has ``"42"`` as one token shows a lone ``"4"`` only where no digit follows. A
teacher that reads a lone ``"4"`` therefore knows that the number has ended, which the student, a
digit a token, could not know when it decided so; and where the student goes on, the two are not
compared there. Supervised in such places, the student is told again and again that it was right to
stop, and never the opposite. (Of language models in general: Phan et al., 2024, tokenization bias.)

So a boundary inside a number is *stable* if whatever digit could follow, the teacher's tokens end
there all the same. Only numbers are looked at: there tokenizers differ by design (Qwen and Gemma
take digits one at a time, Llama 3 and Phi-4 in groups of three). Words are cut alike, and a
continuation that another tokenizer would merge exists for nearly every word but seldom follows.
"""

from __future__ import annotations

import re
import string
from itertools import accumulate

from oprd.tokenizers.token_bytes import TokenBytes

NUMBER = re.compile(rb" ?[0-9]+\Z")
"""The digits that a text ends in, with the space before them, which may be part of their first
token."""

LONGEST = 64
"""Bytes of a number that are read. Boundaries further inside a longer one are called unstable."""


class Boundaries:
    """Which boundaries inside numbers, between tokens of a student and a teacher, are stable.

    Args:
        student, teacher: their tokenizers.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes) -> None:
        self.student, self.teacher = student, teacher
        self._known: dict[str, bool] = {}

    def stable(self, text: bytes) -> bool:
        """Whether the boundary after ``text``, at which tokens of both end, is stable.

        Continuations that the student's own tokenizer would not write from there do not count: its
        tokens say that much themselves.
        """
        number = NUMBER.search(text[-LONGEST - 1 :])
        if number is None:
            return True
        if len(number[0]) > LONGEST:
            return False
        window = number[0].decode()
        if window not in self._known:
            self._known[window] = not any(
                _splits(window, digit, self.student) and not _splits(window, digit, self.teacher)
                for digit in string.digits
            )
        return self._known[window]


def _splits(before: str, after: str, tokenizer: TokenBytes) -> bool:
    """Whether a token ends between the two (ASCII) when they are one text."""
    ids = tokenizer.encoder.encode(before + after, add_special_tokens=False).ids
    return len(before) in accumulate(len(tokenizer.spell(i) or b"") for i in ids)

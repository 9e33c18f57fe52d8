"""Boundaries inside numbers at which a teacher's tokens reveal what the student writes next.

A tokenizer that has ``"42"`` as one token produces a lone ``"4"`` only where no digit follows. A
teacher that reads a lone ``"4"`` therefore knows that the number has ended. A student that writes
one digit a token could not know this when it decided to stop. If the student goes on instead, no
teacher token ends there, and the two are not compared. Supervision at such a boundary would only
ever tell the student that it was right to stop, and never the opposite. (Phan et al., 2024,
describe this tokenization bias for language models in general.)

A boundary inside a number is therefore *stable* if the teacher's tokens end there whichever digit
follows. Only numbers are checked, because tokenizers differ there by design: Qwen and Gemma take
digits one at a time, Llama 3 and Phi-4 in groups of three. Words are cut alike: for nearly every
word there is a continuation that another tokenizer would merge with it, but that continuation
seldom follows.
"""

from __future__ import annotations

import re
import string
from itertools import accumulate

from oprd.tokenizers.token_bytes import TokenBytes

NUMBER = re.compile(rb" ?[0-9]+\Z")
"""The digits at the end of a text, with the space before them: the space may be part of the first
digit's token."""

LONGEST = 64
"""The most bytes of a number that are checked. Boundaries further inside a longer number count as
unstable."""


class Boundaries:
    """The stable boundaries inside numbers for one student tokenizer and one teacher tokenizer.

    Args:
        student, teacher: the bytes of their tokens, and their encoders.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes) -> None:
        self.student, self.teacher = student, teacher
        self._known: dict[str, bool] = {}

    def stable(self, text: bytes) -> bool:
        """Return whether the boundary after ``text``, at which tokens of both end, is stable.

        A digit that the student's own tokenizer would merge with the text before it is not counted:
        the student's tokens, too, reveal that such a digit does not follow.
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
    """Return whether a token ends after ``before`` in ``before + after`` (both ASCII)."""
    ids = tokenizer.encoder.encode(before + after, add_special_tokens=False).ids
    return len(before) in accumulate(len(tokenizer.spell(i) or b"") for i in ids)

"""One response, two tokenizers: which tokens of student and teacher end at the same byte.

The student samples token ids. A teacher with another tokenizer must read the same *text* as its own
tokens; the two can be compared where a token of each ends at the same byte of the response. Other
positions are left unsupervised: nothing is interpolated or guessed.

What is done with the parts of a response:

- Text: the exact bytes of the student's tokens, a leading space included, become teacher tokens.
  They are encoded on their own, as a continuation (no BOS, no dummy prefix space), and joined after
  the teacher's prompt: tokens never merge across that border, as they could not while sampling.
- The student's final EOS: pairs with the token that ends the teacher's turn.
- A special token inside the response: pairs with the teacher's added token of the same content
  if there is one (``<think>``); otherwise the teacher does not see it, and it is unpaired. Text
  that merely spells a special token stays text.
- Bytes that are no UTF-8: as single-byte tokens, where the teacher has them, else pairing ends.
  The beginning of a character at the end of a response cut short is left out, unpaired.
- Text that the teacher's normalizer changes (NFC, say): pairs only where the change is known to
  have begun or ended; tokens within it are unpaired. An unknown token is never paired itself.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from tokenizers import Encoding
from transformers import (
    PreTrainedTokenizerBase,
)

from oprd.tokenizers.digit_boundaries import LONGEST, Boundaries
from oprd.tokenizers.token_bytes import TokenBytes, token_bytes

UNCERTAIN = -1

Pairs = Literal["stable", "all"]


class Aligner:
    """Pairs the responses of one student with the tokens of one teacher.

    Args:
        student, teacher: their tokenizers.
        pairs: ``stable``: inside a number only where the teacher's tokens end whichever digit
            follows (`oprd.tokenizers.digit_boundaries`); ``all``: wherever tokens of both end.

    Raises:
        ConfigError: for a tokenizer whose tokens' bytes aren't known, by name.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        pairs: Pairs = "stable",
    ) -> None:
        self.student_end, self.teacher_end = student.eos_token_id, teacher.eos_token_id
        self.student_bytes = token_bytes(student, "student's")
        self.teacher_bytes = token_bytes(teacher, "teacher's")
        self.boundaries: Boundaries | None = None
        if pairs == "stable":
            self.boundaries = Boundaries(self.student_bytes, self.teacher_bytes)

    def __call__(
        self,
        response_ids: Sequence[int],
        prompt_ids: Sequence[int],
        *,
        student_end_ids: Collection[int] | None = None,
        teacher_end_id: int | None = None,
    ) -> Reading:
        """How the teacher reads one rollout.

        Args:
            response_ids: what the student sampled, EOS included if it was reached.
            prompt_ids: the prompt in the teacher's tokens (`oprd.data.prompts.Prompt.teacher_ids`).
            student_end_ids: tokens that end the student's response; None: its tokenizer's EOS.
            teacher_end_id: what ends the teacher's turn (`end_of_turn`); None: its tokenizer's EOS.
        """
        response = list(response_ids)
        ends = {self.student_end} if student_end_ids is None else student_end_ids
        end = self.teacher_end if teacher_end_id is None else teacher_end_id
        ended = bool(response) and response[-1] in ends
        body = response[:-1] if ended else response
        theirs, ours_at, theirs_at, whole = align_text(
            body, self.student_bytes, self.teacher_bytes, complete=ended
        )
        pairs = self._supervised(body, zip(ours_at, theirs_at, strict=True))
        if ended and whole:  # else the teacher would end a turn whose text it has not read
            pairs.append((len(body), len(theirs)))
            theirs = [*theirs, end]
        return Reading(list(prompt_ids), theirs, pairs)

    def _supervised(
        self, body: list[int], pairs: Iterable[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        if self.boundaries is None:
            return list(pairs)
        # A special token, which spells nothing, ends the word before it.
        spelled = [b"\n" if s is None else s for s in map(self.student_bytes.spell, body)]
        ends = list(accumulate(map(len, spelled)))
        text = b"".join(spelled)
        stable, window = self.boundaries.stable, LONGEST + 1
        return [(i, j) for i, j in pairs if stable(text[max(0, ends[i] - window) : ends[i]])]


def align_text(
    ids: Sequence[int], student: TokenBytes, teacher: TokenBytes, complete: bool
) -> tuple[list[int], list[int], list[int], bool]:
    """Pair by bytes.

    Args:
        ids: the student's tokens, without the final EOS.
        complete: whether the response ended by itself. If not, it may end inside a character.

    Returns:
        The teacher's tokens; student positions and teacher positions that end together; and
        whether the teacher's tokens are certain to cover all of the text.
    """
    theirs: list[int] = []
    ours_at: list[int] = []
    theirs_at: list[int] = []
    run: list[int] = []  # student positions with bytes, since the last shared special token

    def flush(complete: bool) -> bool:
        spelled = [student.spell(ids[i]) or b"" for i in run]
        ends = np.cumsum([len(b) for b in spelled], dtype=np.int64)
        tokens, token_ends, whole = _encode(b"".join(spelled), teacher, complete)
        _, a, b = np.intersect1d(ends, token_ends, assume_unique=False, return_indices=True)
        sure = token_ends[b] != UNCERTAIN
        ours_at.extend(run[i] for i in a[sure])
        theirs_at.extend((b[sure] + len(theirs)).tolist())
        theirs.extend(tokens)
        run.clear()
        return whole

    special = {i: content for content, i in student.special.items()}
    for position, token in enumerate(ids):
        if token in special and special[token] in teacher.added:
            if not flush(complete=True):
                return theirs, ours_at, theirs_at, False
            ours_at.append(position)
            theirs_at.append(len(theirs))
            theirs.append(teacher.added[special[token]])
        elif student.spell(token):
            run.append(position)
    whole = flush(complete)
    return theirs, ours_at, theirs_at, whole


def _encode(data: bytes, teacher: TokenBytes, complete: bool) -> tuple[list[int], np.ndarray, bool]:
    """Teacher tokens of bytes, where each ends (int64; UNCERTAIN: not known), and whether the
    tokens cover everything."""
    tokens: list[int] = []
    ends: list[np.ndarray] = []
    start = 0
    while start < len(data):
        stop = after = len(data)
        try:
            text = data[start:].decode()
        except UnicodeDecodeError as error:
            stop, after = start + error.start, start + error.end
            text = data[start:stop].decode()
            if not complete and error.reason == "unexpected end of data":
                after = stop  # cut inside a character: the rest of it may have been sampled next
        ids, found, covered = _encode_text(text, teacher)
        tokens += ids
        ends.append(np.where(found == UNCERTAIN, UNCERTAIN, found + start))
        if not covered:
            return tokens, np.concatenate(ends), False
        stray = data[stop:after]
        if any(b not in teacher.single for b in stray) or (after == stop < len(data)):
            return tokens, np.concatenate(ends), False
        tokens += [teacher.single[b] for b in stray]
        ends.append(np.arange(stop + 1, after + 1, dtype=np.int64))
        start = after
    return tokens, np.concatenate(ends) if ends else np.empty(0, np.int64), True


def _encode_text(text: str, teacher: TokenBytes) -> tuple[list[int], np.ndarray, bool]:
    encoding = teacher.encoder.encode(text, add_special_tokens=False)
    raw, decoded = text.encode(), teacher.as_decoded(text).encode()
    spelled = [teacher.spell(i) for i in encoding.ids]
    changed = decoded != raw
    if None not in spelled and b"".join(s or b"" for s in spelled) == decoded:
        ends = np.cumsum([len(s or b"") for s in spelled], dtype=np.int64)
        covered = True
    else:
        ends, covered = _walk(encoding, spelled, decoded, None if changed else text)
    if changed:
        origin = _origin(text, teacher)
        if origin is None:
            same = _common_prefix(raw, decoded)
            origin = np.full(len(decoded) + 1, UNCERTAIN, np.int64)
            origin[: same + 1] = np.arange(same + 1)
            covered = False
        ends = np.where(ends == UNCERTAIN, UNCERTAIN, origin[ends])
    return encoding.ids, _last_of_each(ends), covered


def _walk(
    encoding: Encoding, spelled: list[bytes | None], expected: bytes, text: str | None
) -> tuple[np.ndarray, bool]:
    """Ends of tokens that do not spell ``expected`` to the letter: up to the first that spells
    something else, and past unknown ones, whose length the offsets give (if there is a text
    that they refer to) and the bytes after them must confirm."""
    ends = np.full(len(spelled), UNCERTAIN, np.int64)
    position = confirmed = 0
    for j, piece in enumerate(spelled):
        if piece is None:
            if text is None:
                break
            confirmed = j
            position = len(text[: encoding.offsets[j][1]].encode())
        elif expected.startswith(piece, position):
            position += len(piece)
            ends[j] = position
        else:
            break
    else:
        if position == len(expected):
            return ends, True
    if None in spelled[: confirmed + 1]:  # nothing after it showed that the length was right
        ends[spelled.index(None) :] = UNCERTAIN
    return ends, False


def _origin(text: str, teacher: TokenBytes) -> np.ndarray | None:
    """For each byte offset of the decoded text that of the original, UNCERTAIN inside what the
    normalizer changed; None if its changes can't be told apart piece by piece."""
    offsets: list[int] = [0]
    start, joined = 0, []
    known: dict[str, str] = {}
    for cluster in _clusters(text):
        if cluster not in known:
            known[cluster] = teacher.as_decoded(cluster)
        new, size = known[cluster].encode(), len(cluster.encode())
        joined.append(known[cluster])
        if known[cluster] == cluster:
            offsets.extend(range(start + 1, start + size + 1))
        elif new:
            offsets.extend([UNCERTAIN] * (len(new) - 1) + [start + size])
        start += size
    if "".join(joined) != teacher.as_decoded(text):
        return None
    return np.array(offsets, dtype=np.int64)


def _clusters(text: str) -> list[str]:
    """Pieces that normal forms change independently: a character with the marks and conjoining
    jamo that follow it, and runs of white space."""
    pieces: list[str] = []
    for c in text:
        mark = unicodedata.category(c)[0] == "M" or 0x1160 <= ord(c) < 0x1200
        if pieces and (mark or (c.isspace() and pieces[-1].isspace())):
            pieces[-1] += c
        else:
            pieces.append(c)
    return pieces


def _common_prefix(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a[:size], "u1") != np.frombuffer(b[:size], "u1"))
    return int(different[0]) if len(different) else size


def _last_of_each(ends: np.ndarray) -> np.ndarray:
    """Of several tokens with one end (one of them spells nothing), only the last has it."""
    again = np.zeros(len(ends), bool)
    again[:-1] = ends[:-1] == ends[1:]
    return np.where(again, UNCERTAIN, ends)


@dataclass(frozen=True)
class Reading:
    """What the teacher reads in place of a rollout's tokens: after another prompt, say.

    Attributes:
        prompt_ids, response_ids: the teacher's token ids.
        pairs: (i, j): the student's i-th response token and the teacher's j-th end at the same
            place of the text; both increase. None: they are the same tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    pairs: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

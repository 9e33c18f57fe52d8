"""Alignment of one response between a student's and a teacher's tokenizer, by bytes.

The student samples token ids. A teacher with another tokenizer reads the same *text* as its own
tokens. The two are compared where a student token and a teacher token end at the same byte of the
response. All other positions are unsupervised: nothing is interpolated or guessed.

Each part of a response is handled as follows:

- Text: the exact bytes of the student's tokens, including a leading space, are encoded as teacher
  tokens. They are encoded on their own, as a continuation (no BOS, no dummy prefix space), and
  appended to the teacher's prompt. Tokens never merge across the border between prompt and
  response, because they could not merge there while sampling.
- Final EOS: the student's EOS is paired with the token that ends the teacher's turn.
- Special tokens: a special token inside the response is paired with the teacher's added token of
  the same content if there is one (``<think>``). Otherwise the teacher does not read it, and it is
  unpaired. Text that merely spells a special token stays text.
- Invalid UTF-8: each byte becomes a single-byte teacher token. If the teacher lacks such a token,
  pairing stops there. If a truncated response ends inside a character, the bytes of that character
  are left out and unpaired.
- Normalized text: if the teacher's normalizer (NFC, for example) changes characters, tokens inside
  the changed span are not compared. An unknown token is never paired.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from oprd.tokenizers.digit_boundaries import LONGEST, Boundaries
from oprd.tokenizers.token_bytes import TokenBytes, token_bytes

UNCERTAIN = -1

Pairs = Literal["stable", "all"]


class Aligner:
    """A callable that aligns responses of one student with the tokens of one teacher.

    Args:
        student, teacher: the tokenizers.
        pairs: ``stable``: inside a number, pair tokens only where the teacher's tokens end
            whichever digit follows (`oprd.tokenizers.digit_boundaries`); ``all``: pair tokens
            wherever tokens of both end.

    Raises:
        ConfigError: if the bytes of a tokenizer's tokens cannot be determined.
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
        """Return the teacher's tokens for one rollout, and their pairing with the student's.

        Args:
            response_ids: token ids that the student sampled, including EOS if it was reached.
            prompt_ids: the prompt in the teacher's tokens (`oprd.data.prompts.Prompt.teacher_ids`).
            student_end_ids: tokens that end the student's response. None: the EOS token of the
                student's tokenizer.
            teacher_end_id: the token that ends the teacher's turn (`end_of_turn`). None: the EOS
                token of the teacher's tokenizer.
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
        if ended and whole:  # otherwise the teacher would end a turn that it has only read in part
            pairs.append((len(body), len(theirs)))
            theirs = [*theirs, end]
        return Reading(list(prompt_ids), theirs, pairs)

    def _supervised(
        self, body: list[int], pairs: Iterable[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        if self.boundaries is None:
            return list(pairs)
        # A special token spells nothing, but it ends the word before it.
        spelled = [b"\n" if s is None else s for s in map(self.student_bytes.spell, body)]
        ends = list(accumulate(map(len, spelled)))
        text = b"".join(spelled)
        stable, window = self.boundaries.stable, LONGEST + 1
        return [(i, j) for i, j in pairs if stable(text[max(0, ends[i] - window) : ends[i]])]


def align_text(
    ids: Sequence[int], student: TokenBytes, teacher: TokenBytes, complete: bool
) -> tuple[list[int], list[int], list[int], bool]:
    """Encode a response as teacher tokens, and find the tokens of both that end at the same byte.

    Args:
        ids: the student's tokens, without the final EOS.
        complete: True if the response ended with EOS. A response that did not may end inside a
            character.

    Returns:
        The teacher's tokens; the paired student positions; the teacher positions they are paired
        with; and whether the teacher's tokens are certain to cover the whole text.
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
    """Encode bytes as teacher tokens.

    Returns:
        The tokens; the byte offset at which each ends, int64, UNCERTAIN if it is not known; and
        whether the tokens cover all of ``data``.
    """
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
                after = stop  # truncated inside a character: these bytes are left out
        ids, text_ends, covered = _encode_text(text, teacher)
        tokens += ids
        ends.append(np.where(text_ends == UNCERTAIN, UNCERTAIN, text_ends + start))
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
    """Find where tokens end that do not spell ``expected`` exactly.

    The walk stops at the first token that spells something else. The length of an unknown token is
    taken from the offsets of ``encoding``. It is trusted only if the tokens after it spell the rest
    of ``expected``.

    Args:
        spelled: the bytes of each token; None for an unknown token.
        expected: the bytes that all tokens together should spell.
        text: the text that the offsets refer to. None: the offsets cannot be used, and the walk
            stops at an unknown token.

    Returns:
        The end of each token, int64, UNCERTAIN if it is not known; and whether the walk reached
        the end of ``expected``.
    """
    ends = np.full(len(spelled), UNCERTAIN, np.int64)
    position = last_unknown = 0
    for j, piece in enumerate(spelled):
        if piece is None:
            if text is None:
                break
            last_unknown = j
            position = len(text[: encoding.offsets[j][1]].encode())
        elif expected.startswith(piece, position):
            position += len(piece)
            ends[j] = position
        else:
            break
    else:
        if position == len(expected):
            return ends, True
    if None in spelled[: last_unknown + 1]:  # its length could not be confirmed
        ends[spelled.index(None) :] = UNCERTAIN
    return ends, False


def _origin(text: str, teacher: TokenBytes) -> np.ndarray | None:
    """Map each byte offset of the normalized text to a byte offset of ``text``.

    Offsets inside a span that the normalizer changed map to UNCERTAIN.

    Returns:
        The offsets, int64; or None if normalizing the text piece by piece gives another result
        than normalizing it as a whole.
    """
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
    """Split text into pieces that Unicode normal forms change independently.

    A piece is a character with the marks and conjoining jamo that follow it, or a run of white
    space.
    """
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
    """Set the end of every token but the last to UNCERTAIN where consecutive tokens share an end.

    Consecutive tokens share an end if the later ones spell nothing.
    """
    again = np.zeros(len(ends), bool)
    again[:-1] = ends[:-1] == ends[1:]
    return np.where(again, UNCERTAIN, ends)


@dataclass(frozen=True)
class Reading:
    """The token ids that the teacher reads for a rollout, where they differ from the student's.

    Attributes:
        prompt_ids, response_ids: the teacher's token ids.
        pairs: (i, j): the student's i-th response token and the teacher's j-th response token end
            at the same place in the text. Both indices increase. None: the response tokens are
            the same.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    pairs: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

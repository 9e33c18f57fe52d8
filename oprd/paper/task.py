"""The task: column addition worked out step by step, ending in a boxed answer.

A prompt is ``"583+219="``. A response goes through the columns from the right, and its wording
varies:

    3+9 is 12, write 2, carry 1. 8+1+1 gives 10, put 0, carry 1. Check: 10-1-1 is 8. 5+2+1 is 8,
    write 8. So \\boxed{802}

Numbers of three, four and five digits are the three levels of difficulty. A response has 30 to 123
tokens, most of them between 40 and 90.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.atomic_files import write_whole

LEVELS = {"three_digits": 3, "four_digits": 4, "five_digits": 5}
"""The held-out sets by name, with the number of digits of their numbers."""
TEST, VAL, TRAIN = 200, 100, 6400
"""Problems in each held-out set, in the validation set, and in the set of training prompts."""
PROMPT_TOKENS = 2 * max(LEVELS.values()) + 2
RESPONSE_TOKENS = 128
"""Limit of a response; the longest correct one has 123 tokens, EOS included."""

VERBS = (" is ", " gives ", " makes ")
WRITES = (", write ", ", put ")
ENDINGS = ("So \\boxed{", "The sum is \\boxed{")
CARRY, STOP, CHECK, LAST, CLOSE = ", carry ", ". ", "Check: ", "Then write ", "}"
DIGITS = "0123456789"
WORDS = (*VERBS, *WRITES, *ENDINGS, CARRY, STOP, CHECK, LAST, CLOSE)
SPECIAL = ("<pad>", "<eos>", "<unk>")
CHECKS = 0.5
"""Share of the columns that a response checks."""


@dataclass(frozen=True)
class Problem:
    """One problem, ``a + b``; both numbers have the same number of digits."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return f"\\boxed{{{self.a + self.b}}}"

    def response(self, rng: random.Random, checks: float = CHECKS) -> str:
        """Work the sum out, in words that ``rng`` chooses.

        Args:
            checks: probability that a column is checked by subtraction.
        """
        carry, text = 0, ""
        for x, y in zip(str(self.a)[::-1], str(self.b)[::-1], strict=True):
            total = int(x) + int(y) + carry
            more = "+1" if carry else ""
            text += f"{x}+{y}{more}{rng.choice(VERBS)}{total}{rng.choice(WRITES)}{total % 10}"
            text += f"{CARRY}1{STOP}" if total > 9 else STOP
            if rng.random() < checks:
                text += f"{CHECK}{total}-{y}{more.replace('+', '-')}{rng.choice(VERBS)}{x}{STOP}"
            carry = total // 10
        if carry:
            text += f"{LAST}1{STOP}"
        return f"{text}{rng.choice(ENDINGS)}{self.a + self.b}{CLOSE}"


@dataclass(frozen=True)
class Splits:
    """Disjoint sets of problems. A sum and its mirror image (a+b, b+a) are in the same set."""

    tests: dict[str, list[Problem]]
    val: list[Problem]
    train: list[Problem]

    @property
    def held_out(self) -> set[tuple[int, int]]:
        """The pairs of numbers, the smaller first, that no training uses."""
        problems = [*self.val, *(p for test in self.tests.values() for p in test)]
        return {_pair(p) for p in problems}


def _pair(problem: Problem) -> tuple[int, int]:
    return min(problem.a, problem.b), max(problem.a, problem.b)


def draw(rng: random.Random, digits: int) -> Problem:
    """Draw a problem with numbers of ``digits`` digits."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    return Problem(rng.randint(low, high), rng.randint(low, high))


def make_splits(seed: int = 0) -> Splits:
    """Draw the held-out sets, one for each level, and the validation and training prompts, in which
    the levels take turns."""
    rng, taken = random.Random(seed), set[tuple[int, int]]()

    def several(number: int, levels: Sequence[int]) -> list[Problem]:
        chosen: list[Problem] = []
        while len(chosen) < number:
            problem = draw(rng, levels[len(chosen) % len(levels)])
            if _pair(problem) not in taken:
                taken.add(_pair(problem))
                chosen.append(problem)
        return chosen

    levels = [*LEVELS.values()]
    tests = {name: several(TEST, [digits]) for name, digits in LEVELS.items()}
    return Splits(tests, several(VAL, levels), several(TRAIN, levels))


def sample_problems(held_out: set[tuple[int, int]], seed: int) -> Iterator[Problem]:
    """Yield endless problems that are not held out, of the levels in turn."""
    rng = random.Random(seed)
    while True:
        for digits in LEVELS.values():
            problem = draw(rng, digits)
            if _pair(problem) not in held_out:
                yield problem


def _tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the given words; it splits text into the longest ones."""
    vocabulary = [*SPECIAL, *words]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    longest = sorted(vocabulary[len(SPECIAL) :], key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(map(re.escape, longest))), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of student and teacher: a token for each digit, sign and word."""
    return _tokenizer([*DIGITS, *"+-=", *WORDS])


def make_other_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that cuts the same text elsewhere.

    A sign and the digit behind it are one token, and so are the pieces of phrases that the first
    tokenizer keeps whole: ``", write "`` is ``","``, ``" write"`` and ``" "``.
    """
    signed = [f"{sign}{digit}" for sign in "+-" for digit in DIGITS]
    pieces = dict.fromkeys(p for w in WORDS for p in re.findall(r" ?[A-Za-z]+|\\boxed|.", w))
    return _tokenizer([*signed, *DIGITS, *"+-=", *pieces])


def write_problems(file: Path, problems: Iterable[Problem]) -> None:
    """Write one problem a line, with the field names of `oprd`'s prompt files."""
    rows = ({"prompt": p.prompt, "answer": p.answer} for p in problems)
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_prompts(directory: Path) -> None:
    """Write ``train.jsonl``, ``val.jsonl`` and a file for each of `LEVELS`."""
    splits = make_splits()
    directory.mkdir(parents=True, exist_ok=True)
    for name, problems in {"train": splits.train, "val": splits.val, **splits.tests}.items():
        write_problems(directory / f"{name}.jsonl", problems)

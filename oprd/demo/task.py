"""The demo task: three-digit addition, one token per character.

A prompt is ``"483+219="``; the response is the sum's digits, least significant first, then EOS
(``"207"``), so that a causal model knows the carry before it emits a digit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.atomic_files import write_whole

FIRST, LAST = 100, 999
"""Smallest and largest operand (three digits)."""

PROMPT_TOKENS = 8
RESPONSE_TOKENS = 5
"""Tokens of the longest response: four digits and EOS."""


@dataclass(frozen=True)
class Sum:
    """One problem, ``a + b``."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """The sum's digits, least significant first."""
        return str(self.a + self.b)[::-1]


@dataclass(frozen=True)
class Splits:
    """Disjoint sets of problems. A sum and its mirror image (a+b, b+a) are in the same set."""

    test: list[Sum]
    val: list[Sum]
    train: list[Sum]
    rest: list[Sum]
    """All problems outside test and val; supervised training samples from them."""


def make_splits(
    num_test: int = 2000, num_val: int = 500, num_train: int = 6400, seed: int = 0
) -> Splits:
    """Split all unordered pairs of operands into disjoint sets.

    Of a seeded shuffle, the first ``num_test`` are the test set and the next ``num_val`` the
    validation set. ``train`` (OPRD's prompts) is a sample of the rest.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(FIRST, LAST + 1) for b in range(a, LAST + 1)]
    rng.shuffle(pairs)
    sums = [Sum(a, b) if rng.random() < 0.5 else Sum(b, a) for a, b in pairs]
    rest = sums[num_test + num_val :]
    return Splits(
        test=sums[:num_test],
        val=sums[num_test : num_test + num_val],
        train=rest[:num_train],
        rest=rest,
    )


def sample_batches(sums: list[Sum], batch_size: int, seed: int) -> Iterator[list[Sum]]:
    """Yield endless batches drawn with replacement, with operands in either order."""
    rng = random.Random(seed)
    while True:
        batch = rng.choices(sums, k=batch_size)
        yield [Sum(s.b, s.a) if rng.random() < 0.5 else s for s in batch]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a character-level tokenizer: ``<pad> <eos> <unk>``, ``+``, ``=`` and ten digits."""
    symbols = ["<pad>", "<eos>", "<unk>", "+", "=", *"0123456789"]
    tokenizer = Tokenizer(
        models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=PROMPT_TOKENS + RESPONSE_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def write_sums(file: Path, sums: Iterable[Sum]) -> None:
    """Write one sum a line, with the field names of `oprd`'s prompt files."""
    rows = ({"prompt": s.prompt, "answer": s.answer} for s in sums)
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))

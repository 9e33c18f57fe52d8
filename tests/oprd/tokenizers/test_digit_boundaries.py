"""Boundaries between tokens that tell a teacher what the student writes next are not supervised."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.demo.bridge_teacher import PAIRS, make_pair_tokenizer
from oprd.demo.task import make_tokenizer
from oprd.tokenizers.alignment import Aligner
from oprd.tokenizers.digit_boundaries import LONGEST, Boundaries
from oprd.tokenizers.token_bytes import token_bytes
from tests.support import tiny


def greedy(pattern: str, *tokens: str):
    """A tokenizer of what ``pattern`` cuts: ``tokens`` and single characters."""
    symbols = ["<pad>", "<eos>", "<unk>", *"+= 0123456789abcdefghijklmnopqrstuvwxyz.", *tokens]
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(dict.fromkeys(symbols))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


SINGLE = greedy(".")
GROUPS = greedy(r"\d{1,3}|.", *(f"{i:0{n}d}" for n in (2, 3) for i in range(10**n)))


def boundaries(student, teacher):
    return Boundaries(token_bytes(student), token_bytes(teacher))


@pytest.mark.parametrize(
    ("text", "stable"),
    [
        ("", True), ("2", False), ("20", False), ("207", True), ("2071", False), ("207165", True),
        ("a 4", False), ("a 42.", True), ("a ", True), ("7a", True), ("é", True),
    ],
)  # fmt: skip
def test_digits_in_groups_of_three(text, stable):
    """As Llama-3's and Phi-4's numbers to a student with single digits (Qwen, Gemma)."""
    assert boundaries(SINGLE, GROUPS).stable(text.encode()) is stable


def test_what_the_students_own_tokens_tell_it_is_no_secret():
    assert boundaries(GROUPS, GROUPS).stable(b"2")
    assert boundaries(GROUPS, GROUPS).stable(b"20")
    assert boundaries(GROUPS, SINGLE).stable(b"20")


def test_beyond_what_is_looked_at():
    found = boundaries(SINGLE, GROUPS)
    assert found.stable(b"9" * 63)
    assert found.stable(b"." + b"9" * 63)
    assert not found.stable(b"9" * (LONGEST + 2))


def test_the_aligner_leaves_them_out():
    ids = [SINGLE.convert_tokens_to_ids(c) for c in "2071"]
    end = SINGLE.eos_token_id
    aligner = Aligner(SINGLE, GROUPS)
    assert aligner([*ids, end], [5]).pairs == [(2, 0), (4, 2)]
    assert aligner([*ids[:2], end], [5]).pairs == [(2, 1)]  # the end itself is compared
    every = Aligner(SINGLE, GROUPS, pairs="all")
    assert every([*ids, end], [5]).pairs == [(2, 0), (3, 1), (4, 2)]
    assert every([*ids[:2], end], [5]).pairs == [(1, 0), (2, 1)]


def test_no_choice_depends_on_what_follows():
    """The demo's pair: a boundary is supervised after every continuation or after none, and the
    teacher's tokens up to there are the same."""
    student, teacher = make_tokenizer(), make_pair_tokenizer()
    aligner = Aligner(student, teacher)
    for text in ("2", "20", "8", "86", "9", "986", "209", "99", "888"):
        seen = set()
        for more in ("", *map(str, range(100)), *"0123456789"):
            reading = aligner(student(text + more)["input_ids"], [5])
            partner = dict(reading.pairs).get(len(text) - 1)
            seen.add(None if partner is None else tuple(reading.response_ids[: partner + 1]))
        assert len(seen) == 1, (text, seen)


def test_a_tokenizer_that_gives_the_end_away_supervises_only_the_prompt_and_the_end():
    student = make_tokenizer()
    ids = student("2071<eos>")["input_ids"]
    assert Aligner(student, tiny.make_pair_tokenizer())(ids, [5]).pairs == [(4, 3)]


def test_the_demos_tokenizer_joins_from_80_on():
    tokenizer = make_pair_tokenizer()
    assert len(PAIRS) == 20
    split = {t: tokenizer.tokenize(t) for t in ("2081", "897", "79", "982+998=")}
    assert split == {
        "2081": ["2", "0", "81"], "897": ["89", "7"], "79": ["7", "9"], "982+998=": [*"982+998="],
    }  # fmt: skip

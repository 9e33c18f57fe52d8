"""The task of ``oprd-paper``: worked additions, their splits and the two tokenizers."""

import itertools
import random
import re

import pytest

from oprd.evaluation.grading import last_boxed
from oprd.paper.task import (
    LEVELS,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Problem,
    make_other_tokenizer,
    make_splits,
    make_tokenizer,
    sample_problems,
)

SPLITS = make_splits()


def steps_are_right(text: str) -> bool:
    """Every equation of a response, by Python's own arithmetic."""
    equations = re.findall(r"([\d+-]+)(?: is | gives | makes )(\d+)", text)
    return all(eval(left) == int(right) for left, right in equations) and len(equations) > 0


def test_every_step_and_the_box_of_a_response_are_right():
    rng = random.Random(0)
    for problem in SPLITS.train[:200]:
        text = problem.response(rng)
        assert steps_are_right(text), text
        assert last_boxed(text) == str(problem.a + problem.b)
        assert last_boxed(problem.answer) == str(problem.a + problem.b)


def test_the_steps_of_a_wrong_response_are_found_wrong():
    assert not steps_are_right("3+9 is 13, write 2, carry 1. ")


@pytest.mark.parametrize("make", [make_tokenizer, make_other_tokenizer])
def test_a_tokenizer_gives_the_text_back(make):
    tokenizer, rng = make(), random.Random(1)
    for problem in SPLITS.train[:50]:
        text = problem.prompt + problem.response(rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_two_tokenizers_cut_the_same_text_differently():
    ours, theirs = make_tokenizer(), make_other_tokenizer()
    text = Problem(583, 219).response(random.Random(0))
    assert ours.tokenize(text) != theirs.tokenize(text)
    assert "+9" in theirs.get_vocab()
    assert "+9" not in ours.get_vocab()


def test_no_prompt_and_no_response_is_longer_than_the_limits():
    tokenizer = make_tokenizer()
    longest = Problem(99999, 99999)  # a carry in every column
    assert len(tokenizer(longest.prompt)["input_ids"]) == PROMPT_TOKENS
    response = longest.response(random.Random(0), checks=1.0)
    assert len(tokenizer(response)["input_ids"]) + 1 <= RESPONSE_TOKENS


def test_held_out_problems_are_in_no_other_set_in_either_order():
    pairs = [
        frozenset((p.a, p.b))
        for problems in (SPLITS.val, SPLITS.train, *SPLITS.tests.values())
        for p in problems
    ]
    assert len(set(pairs)) == len(pairs)
    fresh = itertools.islice(sample_problems(SPLITS.held_out, seed=3), 5000)
    assert not any((min(p.a, p.b), max(p.a, p.b)) in SPLITS.held_out for p in fresh)


def test_each_level_has_numbers_of_its_own_length():
    for name, digits in LEVELS.items():
        assert {len(str(x)) for p in SPLITS.tests[name] for x in (p.a, p.b)} == {digits}

"""Statistics against their definitions."""

import itertools
import random
from math import sqrt

import pytest

from oprd.evaluation.metrics import (
    Scored,
    distinct_4grams,
    paired,
    pass_all,
    pass_at,
    result,
    sizes,
    t_quantile,
)


def scored(*right, boxed=None):
    return Scored(list(right), [4] * len(right), [False] * len(right), None, boxed)


def test_distinct_4grams_are_pooled_over_a_prompts_responses():
    assert distinct_4grams(["a b c d"]) == 100
    assert distinct_4grams(["a b c d", "a b c d"]) == 50
    assert distinct_4grams(["a b c d e", "x"]) == 100
    assert distinct_4grams(["a b c"]) is None


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_mean_over_all_draws(right, k):
    draws = list(itertools.combinations([True] * right + [False] * (5 - right), k))
    assert pass_at(5, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_all(5, right, k) == pytest.approx(sum(map(all, draws)) / len(draws))


def test_a_result_over_problems():
    found = result([
        scored(True, False, True, False, boxed=[True, True, True, False]),
        scored(False, False, False, False, boxed=[True] * 4),
        scored(True, True, True, True, boxed=[True] * 4),
    ])  # fmt: skip
    assert (found.avg, found.best, found.samples, found.problems) == (
        0.5,
        pytest.approx(2 / 3),
        4,
        3,
    )
    assert found.stderr == pytest.approx(0.5 / sqrt(3))
    assert found.pass_at == {
        "2": pytest.approx((5 / 6 + 0 + 1) / 3),
        "4": pytest.approx(found.best),
    }
    assert found.pass_all == {"2": pytest.approx((1 / 6 + 0 + 1) / 3), "4": pytest.approx(1 / 3)}
    assert found.unboxed == pytest.approx(1 / 12)
    metrics = found.metrics("s")
    assert metrics["val/s/avg@4"] == 0.5
    assert metrics["val/s/pass^4"] == pytest.approx(1 / 3)
    assert "val/s/pass@4" not in metrics  # it is best@4


def test_sizes_are_powers_of_two_and_the_whole():
    assert sizes(1) == []
    assert sizes(2) == [2]
    assert sizes(16) == [2, 4, 8, 16]
    assert sizes(6) == [2, 4, 6]


def test_one_problem_has_no_error():
    assert result([scored(True, False)]).stderr is None
    assert result([scored(True)]).pass_at == {}


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (29, 2.045), (30, 2.042), (1318, 1.962)]
)
def test_t_quantiles_are_those_of_the_tables(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_models_are_compared_by_problem():
    first = {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.2}
    second = {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.9}  # problem 3 and 4 are not in both
    found = paired(first, second)
    assert (found.mean, found.better, found.worse, found.problems) == (
        pytest.approx(1 / 3),
        2,
        0,
        3,
    )
    half = 4.303 * (0.5 / sqrt(3)) / sqrt(3)
    assert found.low == pytest.approx(1 / 3 - half, abs=1e-3)
    assert found.high == pytest.approx(1 / 3 + half, abs=1e-3)
    with pytest.raises(ValueError, match="no problem in common"):
        paired({0: 1.0}, {1: 1.0})


def test_the_interval_holds_the_true_difference_in_19_of_20_cases():
    chance, inside, rounds = random.Random(0), 0, 1000
    for _ in range(rounds):
        base = [chance.random() for _ in range(30)]  # problems differ much more than models
        other = [b + chance.gauss(0.1, 0.2) for b in base]
        found = paired(dict(enumerate(base)), dict(enumerate(other)))
        inside += found.low <= 0.1 <= found.high
    assert 0.93 < inside / rounds < 0.97

"""Verdicts on answers, and graders that hang or die."""

import os

import pytest

from oprd.evaluation import grader_pool
from oprd.evaluation.grader_pool import Grade, grade_all
from oprd.evaluation.grading import exact, last_boxed, quick_verdict
from tests.oprd.evaluation.tricky_answers import CASES, RESPONSES


def test_tricky_answers():
    """More than a hundred, through the graders' processes."""
    cases = [(f"so \\boxed{{{boxed}}}.", answer, right) for boxed, answer, right in CASES]
    cases += RESPONSES
    responses, answers = [c[0] for c in cases], [c[1] for c in cases]
    assert len(set(cases)) == len(cases) > 100
    grades = grade_all("math", responses, answers, seconds=60)
    wrong = [case for case, g in zip(cases, grades, strict=True) if g.right is not case[2]]
    assert not wrong
    assert {g.failed for g in grades} == {None}
    assert [g.boxed for g in grades] == [last_boxed(r) is not None for r in responses]


def test_whole_numbers_need_no_other_process(monkeypatch):
    monkeypatch.setattr(grader_pool, "WORKER", "no.such.module")
    grades = grade_all("math", [r"\boxed{142}", r"\boxed{0142}", r"\boxed{7}", "7"], ["142.0"] * 4)
    assert [g.right for g in grades] == [True, True, False, False]
    assert [g.boxed for g in grades] == [True, True, True, False]
    assert quick_verdict("9" * 5000, "9" * 5000 + ".0") is True  # int() refuses as many digits
    assert quick_verdict("-0", "0.0") is True
    assert quick_verdict("1/2", "0.5") is None


def test_exact_and_last_boxed():
    assert exact(" 207\n", "207")
    assert not exact("2070", "207")
    assert last_boxed(r"\boxed{a{b}c} and \boxed{d}") == "d"
    assert last_boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert last_boxed(r"\boxed{a{b}") is None


def test_a_response_that_hangs_or_kills_its_grader_costs_only_itself(monkeypatch, caplog):
    monkeypatch.setattr(grader_pool, "WORKER", "tests.support.bad_grader")
    kinds = ["1/2", "hang", "die", "1/3", "hang 2", "die 2", "1/4"]
    responses = [f"\\boxed{{{kind}}}" for kind in kinds]
    with caplog.at_level("WARNING", logger="oprd"):
        grades = grade_all("math", responses, ["5"] * 7, seconds=0.3)
    assert [g.right for g in grades] == [True, False, False, True, False, False, True]
    assert grades[1] == Grade(0.0, boxed=True, failed="the time limit")
    assert grades[2].failed == "a crash (exit code -11)"
    assert "no verdict on 4 responses" in caplog.text


def test_the_real_grader_is_stopped_too():
    tower = r"\boxed{9^{9^{9^{9}}}}"  # minutes, or all of the memory
    easy, hard = grade_all("math", [r"\boxed{\frac{1}{2}}", tower], ["0.5", "3"], seconds=3)
    assert not hard.right
    assert easy == Grade(1.0, boxed=True)


def test_a_grader_that_does_not_start_says_how_to_see_why(monkeypatch):
    monkeypatch.setattr(grader_pool, "WORKER", "no.such.module")
    with pytest.raises(RuntimeError, match=r"python -m no\.such\.module"):
        grade_all("math", [r"\boxed{1/2}"], ["0.5"])


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert grader_pool._workers(1000) == 8
    assert grader_pool._workers(3) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert grader_pool._workers(1000) == 2

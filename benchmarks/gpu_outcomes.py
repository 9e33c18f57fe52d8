"""A pytest plugin for `benchmarks.on_gpu`: a line a test as it ends, so that a run that is ended at
its time limit still counts.

``-p benchmarks.gpu_outcomes``, with the file's name in OPRD_OUTCOMES. Lines: "collected COUNT",
then "passed TEST", "failed TEST", "skipped TEST".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "OPRD_OUTCOMES"


def _note(word: str, what: object) -> None:
    # With pytest-xdist, the process that hands out the tests hears of every one.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ[VARIABLE], "a") as file:
            file.write(f"{word} {what}\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without xdist."""
    if session.items:
        _note("collected", len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """With it, from every worker."""
    _note("collected", len(ids))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that can't be imported."""
    if report.failed:
        _note("failed", report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of set-up and tear-down what is not as it should be."""
    if report.when == "call" or not report.passed:
        _note(report.outcome, report.nodeid)


def count(file: Path) -> dict[str, int]:
    """Tests by outcome; those "not run" if there are any. Empty if none has ended."""
    worst: dict[str, str] = {}
    collected = 0
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        word, _, what = line.partition(" ")
        if word == "collected":
            collected = int(what)
        elif worst.get(what) != "failed":
            worst[what] = word
    if not worst:
        return {}
    ended = list(worst.values())
    counts = {word: ended.count(word) for word in ("passed", "failed", "skipped")}
    left = collected - len(ended)
    return counts | ({"not run": left} if left > 0 else {})

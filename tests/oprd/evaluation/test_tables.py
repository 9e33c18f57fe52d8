"""The tables of ``oprd-eval`` on narrow and wide terminals."""

import pytest

from oprd.evaluation.report import tables
from tests.support.screens import check_fits

SET = {
    "avg": 0.5, "stderr": 0.04, "best": 1.0, "pass_all": {"16": 0.2}, "dist_4g": 91.2,
    "length": 16384.0, "truncated": 0.4, "unboxed": 0.1, "samples": 16, "problems": 500,
    "ungraded": 3,
}  # fmt: skip
CLOSE = {
    "kl": 0.1, "kl_teacher": 0.2, "overlap": 0.9, "entropy": 1.2, "teacher_entropy": 1.1,
    "perplexity": 2.5, "teacher_perplexity": 3.25, "cosine": 0.98,
}  # fmt: skip
BASE, MODEL = "R1-Distill-Qwen-1.5B", "after"


def results():
    models = {
        label: {"sets": {"math500": SET, "aime24": SET}, "closeness": {"math500": CLOSE}}
        for label in (BASE, MODEL)
    }
    difference = {
        "baseline": BASE, "model": MODEL, "mean": 0.1, "low": -0.02, "high": 0.2, "better": 30,
        "worse": 20, "problems": 500,
    }  # fmt: skip
    comparisons = [difference | {"set": "math500"}, difference | {"set": "mean of sets"}]
    return {"models": models, "teacher": "./teacher", "comparisons": comparisons}


@pytest.mark.parametrize(("columns", "number"), [(60, 7), (80, 4), (120, 4)])
def test_tables_fit_the_terminal(columns, number):
    made = tables(results(), columns)
    assert len(made) == number
    text = "\n".join(check_fits(made, columns))
    for column in ("@16 %", "\u00b1", "box %", "16,384", "(t|s)", "3.25", "-2.0", "worse"):
        assert column in text

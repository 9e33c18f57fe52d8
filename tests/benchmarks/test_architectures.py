"""The sweep over architectures finds what it should in some that are built in ways of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import architecture_page, architectures
from oprd.errors import ConfigError

ROOT = Path(__file__).parents[2]
WORKS = {
    "falcon_h1": {"packing"}, "gemma4_text": set(), "mamba": {"packing"}, "qwen3_moe": set(),
    "zamba2": {"packing", architectures.FSDP},
}  # fmt: skip
"""Families that work, and what is refused nevertheless."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By family and column; in a process that has not run autograd yet, or forks could not."""
    file = tmp_path_factory.mktemp("sweep") / "found.json"
    command = ["-m", "benchmarks.architectures", "--json", str(file), "--only", "deepseek_v4"]
    result = subprocess.run(
        [sys.executable, *command, *WORKS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert json.loads(file.read_text())["versions"]["transformers"]
    return {row.kind: row for row in architectures.read(file)["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKS)
def test_what_works_and_what_is_refused(found, kind):
    row = found[kind]
    if row.cls is None and "KeyError" in row.not_built:
        pytest.skip(f"this transformers has no {kind}")
    assert row.bugs == []
    refused = {column for column, text in row.found.items() if text.startswith("refused")}
    assert refused == WORKS[kind]
    assert len(row.found) == len(architectures.CHECKS) + 1


@pytest.mark.slow
def test_several_streams_are_refused_but_for_the_last_layer(found):
    row = found["deepseek_v4"]
    if row.cls is None:
        pytest.skip("this transformers has no deepseek_v4")
    for column in ("attach, all", "attach, even", "dry run", "Bridge", architectures.FSDP):
        assert row.found[column].startswith("refused: the "), column
        assert "not built as OPRD assumes: the states of block 0 have shape" in row.found[column]


def test_outcomes():
    def fails():
        raise AssertionError("the loss is off")

    def refuses():
        raise ConfigError("choose another")

    def crashes():
        return {}["name"]

    assert architectures.outcome(lambda: None) == "works"
    assert architectures.outcome(lambda: "kept whole") == "works: kept whole"
    assert architectures.outcome(refuses) == "refused: choose another"
    assert architectures.outcome(fails) == "FAILS: the loss is off"
    assert architectures.outcome(crashes).startswith("FAILS: KeyError at benchmarks/test_archi")


def test_what_hangs_or_dies_costs_its_own_result():
    def hangs(results):
        results.send(("first", "works"))
        time.sleep(60)

    def dies(results):
        os._exit(3)

    found, ended = architectures._run([(hangs, ())], limit=1.0)
    assert found == [("first", "works")]
    assert ended == "it ran longer than 1 s"
    assert architectures._run([(dies, ())], limit=30.0) == (
        [],
        "its process ended with exit code 3",
    )


def test_the_page_says_what_differs_between_versions():
    def result(version, *rows):
        versions = {"oprd": "1", "transformers": version}
        return {"versions": versions, "rows": [architectures.Row(*row) for row in rows]}

    packing = "refused: packing: the student (ALlama, attn_implementation sdpa) lets them. More"
    new = result(
        "5.24", ("a", "A", None, {"attach": "works", "packing": packing}),
        ("b", "B", None, {"attach": "works"}), ("c", None, "ValueError: why"),
        ("d", "D", None, {"attach": "refused: DModel is not a decoder that oprd knows: no"}),
    )  # fmt: skip
    old = result("5.16", ("a", "A", None, {"attach": "works", "packing": "works"}))
    text = architecture_page.page([new, old], ["make it"])
    assert "| `a` | works | refused [1] |" in text
    assert "1. the model lets them\n" in text
    assert "`d` (DModel)" in text
    assert "- `c`: ValueError: why" in text
    assert "transformers 5.16 has no `b`, `c`, `d`." in text
    assert "`a`: packing: works instead of refused." in text

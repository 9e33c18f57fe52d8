"""``oprd-eval`` samples with vLLM."""

import json

import pytest

from oprd.cli.eval import main

pytestmark = [pytest.mark.vllm, pytest.mark.exhaustive]


def test_the_teacher_solves_the_demos_sums(tmp_path, capsys):
    main(
        [
            *("demo:teacher", "--sets", "demo", "--limit", "12", "--samples", "2"),
            *("--engine", "vllm", "--output_dir", str(tmp_path / "eval")),
        ]
    )
    (model,) = json.loads((tmp_path / "eval" / "results.json").read_text())["models"].values()
    found = model["sets"]["demo"]
    assert (found["problems"], found["samples"], found["avg"]) == (12, 2, 1.0)
    assert "100.0" in capsys.readouterr().out

"""``oprd-compare`` on a few steps of the demo."""

import json

import pytest

from oprd.benchmark.compare import CompareConfig, Comparison, Result, Variant, check, summarise
from oprd.cli.compare import main
from oprd.config import EvalSetConfig, OpdConfig
from oprd.errors import ConfigError


def tiny(directory, **changes):
    cfg = CompareConfig(str(directory), **changes)
    cfg.variants = {
        "OPD top-4": Variant({"opd_topk": 1.0}, OpdConfig(k=4)),
        "OPRD": Variant({"oprd": 1.0}),
    }
    cfg.learning_rates, cfg.seeds = [1e-3, 1e-4], [0, 1]
    cfg.run.steps, cfg.run.rollout.prompts_per_step = 2, 8
    cfg.run.eval.sets = {
        "val": EvalSetConfig("demo:val.jsonl", limit=20, every=1),
        "test": EvalSetConfig("demo:test.jsonl", limit=20),
    }
    return cfg


@pytest.mark.slow
def test_table_figure_and_restart(tmp_path, capsys):
    report = Comparison(tiny(tmp_path)).run()
    assert report == json.loads((tmp_path / "compare.json").read_text())
    assert set(report["variants"]) == {"OPD top-4", "OPRD"}
    for v in report["variants"].values():
        assert v["lr"] in (1e-3, 1e-4)
        assert len(v["accuracy"]) == 2
        assert all(seconds > 0 for seconds in v["seconds"].values())
        assert v["tokens_per_second"] > 0
    table = (tmp_path / "compare.md").read_text()
    assert "| OPRD |" in table
    shown = capsys.readouterr().out
    (row,) = [line for line in table.splitlines() if line.startswith("| OPRD |")]
    printed = [line for line in shown.splitlines() if line.startswith("OPRD ")]
    for cell in row.strip("| ").split(" | "):
        assert any(cell in line for line in printed), cell
    assert (tmp_path / "compare.png").stat().st_size > 1000
    # A teacher, 2 x 2 runs to tune, 2 x 2 to report.
    runs = list(tmp_path.glob("*/*/summary.json"))
    assert len(runs) == 8

    # Started again: what is finished is read; what is not is moved aside and run.
    kept = {run: run.stat().st_mtime_ns for run in runs}
    (lost := runs.pop()).unlink()
    assert Comparison(tiny(tmp_path)).run()["variants"].keys() == report["variants"].keys()
    assert all(run.stat().st_mtime_ns == kept[run] for run in runs)
    assert lost.exists()
    assert (lost.parent.with_name(lost.parent.name + ".unfinished_1") / "metrics.jsonl").exists()

    other = tiny(tmp_path)
    other.run.steps = 3
    with pytest.raises(ConfigError, match="holds a comparison with other settings"):
        Comparison(other).run()
    other = tiny(tmp_path)
    other.variants["OPRD"].objectives["oprd"] = 2.0
    with pytest.raises(ConfigError, match=r"other variants called \['OPRD'\]"):
        Comparison(other).run()


def test_steps_and_seconds_to_the_target():
    cfg = CompareConfig(seeds=[0, 1], target=0.5)
    first = Result([(0, 0.0, 0.1), (10, 4.0, 0.5), (20, 9.0, 0.9)], 0.9, dict.fromkeys(
        ("rollout", "teacher", "student update"), 3.0), None, 10.0)  # fmt: skip
    second = Result([(0, 0.0, 0.1), (10, 5.0, 0.2)], 0.3, first.seconds, 0.5, 30.0)
    teacher = {"val": 0.8, "test": 1.0}
    report = summarise(cfg, teacher, {"x": 1.0}, {"x": [first, second]})
    v = report["variants"]["x"]
    assert report["target_accuracy"] == 0.4
    assert (v["reached"], v["steps_to_target"], v["seconds_to_target"]) == (1, 10, 4.0)
    assert v["accuracy_mean"] == pytest.approx(0.6)
    assert v["accuracy_std"] == pytest.approx(0.4243, abs=1e-4)
    assert v["delta_peak_GB"] == 0.5
    assert v["tokens_per_second"] == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection_set": "dev"}, "run.eval.sets has no 'dev'"),
        ({"learning_rates": []}, "learning_rates must be distinct"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"variants": {}}, "variants is empty"),
        ({"target": 0.0}, "target must lie in"),
    ],
)
def test_mistakes_are_explained(change, message):
    cfg = CompareConfig()
    for name, value in change.items():
        setattr(cfg, name, value)
    with pytest.raises(ConfigError, match=message):
        check(cfg)


def test_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--target", "2"])
    assert stopped.value.code == 2
    assert "oprd-compare: error: target must lie in (0, 1], got 2" in capsys.readouterr().err

"""``oprd-compare`` on a few steps of the demo."""

import json
import signal
from dataclasses import asdict

import pytest

from oprd.benchmark import compare
from oprd.benchmark.compare import (
    CompareConfig,
    Comparison,
    Result,
    Variant,
    check,
    markdown,
    read_result,
    summarise,
)
from oprd.cli.compare import main
from oprd.config import EvalSetConfig, OpdConfig
from oprd.errors import ConfigError
from oprd.observability.summary import EvalResult, Summary, write_summary


def tiny(directory, **changes):
    cfg = CompareConfig(str(directory), **changes)
    cfg.variants = {
        "OPD top-4": Variant({"opd_topk": 1.0}, OpdConfig(k=4)),
        "OPRD": Variant({"oprd": 1.0}),
    }
    cfg.learning_rates, cfg.seeds = [1e-3, 1e-4], [0, 1]
    cfg.run.steps, cfg.run.rollout.prompts_per_step = 2, 8
    cfg.run.eval.samples, cfg.run.eval.temperature = 2, 1.0
    cfg.run.eval.sets = {
        "val": EvalSetConfig("demo:val.jsonl", limit=10, every=1),
        "test": EvalSetConfig("demo:test.jsonl", limit=10),
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
    assert "test avg@2, mean ± std" in table
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


def test_accuracy_over_several_samples_is_read_and_named(tmp_path):
    """The evaluations are in metrics.jsonl as avg@4, and not as avg@1."""
    cfg = CompareConfig(seeds=[0])
    cfg.run.eval.samples = 4
    right = EvalResult(0.75, 1.0, None, 3.0, 0.0, samples=4)
    summary = Summary(tmp_path, tmp_path, 1, False, {"student after": {"test": right}})
    write_summary(summary)
    line = {"step": 0, "model": "student before", **right.metrics("val")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = read_result(tmp_path, cfg)
    assert (found.curve, found.accuracy) == ([(0, 0.0, 0.75)], 0.75)
    report = summarise(cfg, {"val": 1.0, "test": 1.0}, {"OPRD": 1e-3}, {"OPRD": [found]})
    assert report["metric"] == "avg@4"
    assert "| test avg@4, mean ± std |" in markdown(cfg, report)
    compare.plot(cfg, 1.0, {"OPRD": [found]}, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a b", "a-b"], "the runs of 'a-b' and of 'a b' would share the directory a_b: rename"),
        (["Large", "large"], "the runs of 'large' and of 'Large' would share the directory"),
        (["Teacher"], "the runs of 'Teacher' and of the teacher would share"),
        ([""], "'' can't name a directory"),
        (["long " * 60], "can't name a directory: give it 1 to 200 bytes"),
    ],
)
def test_variants_that_would_share_a_directory_are_refused(names, message):
    cfg = CompareConfig(variants={name: Variant({"oprd": 1.0}) for name in names})
    with pytest.raises(ConfigError, match=message):
        check(cfg)


def test_variants_of_an_earlier_start_keep_their_directories(tmp_path):
    first = tiny(tmp_path)
    first.variants = {"a b": Variant({"oprd": 1.0})}
    Comparison(first)._keep_config()
    kept = (tmp_path / "config.json").read_text()
    second = tiny(tmp_path)
    second.variants = {"a-b": Variant({"oprd": 2.0})}
    with pytest.raises(ConfigError, match="would share the directory a_b"):
        Comparison(second)._keep_config()
    assert (tmp_path / "config.json").read_text() == kept


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", ["teacher", "OPD"])
def test_a_signal_ends_the_comparison_as_it_ends_a_run(
    tmp_path, monkeypatch, capsys, signum, code, at
):
    """Also the teacher's run, whose one step is of no interest but whose evaluation is."""
    done = EvalResult(1.0, 1.0, None, 3.0, 0.0, samples=1)
    runs = []

    def train(run):
        runs.append(run)
        ends = ("teacher" in run.output_dir) == (at == "teacher")
        sets = {"val": done, "test": done}
        summary = Summary(
            tmp_path / run.output_dir, tmp_path, 1, ends, {"teacher": sets},
            stopped_by=signum if ends else None,
        )  # fmt: skip
        summary.directory.mkdir(parents=True)
        write_summary(summary)
        return summary

    monkeypatch.setattr(compare, "train", train)
    with pytest.raises(SystemExit) as stopped:
        main(["--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == code
    assert "interrupted; run the same command again" in capsys.readouterr().err
    assert len(runs) == (1 if at == "teacher" else 2)
    assert not list((tmp_path / "out").rglob("summary.json")) or at != "teacher"
    assert (tmp_path / "out" / "teacher.json").exists() == (at != "teacher")
    assert not (summary := tmp_path / runs[-1].output_dir / "summary.json").exists(), summary


def test_a_full_disk_leaves_the_configuration_as_it_was(tmp_path, monkeypatch):
    cfg = tiny(tmp_path)
    Comparison(cfg)._keep_config()
    kept = (tmp_path / "config.json").read_text()
    cfg.variants["another"] = Variant({"oprd": 2.0})
    values = json.loads(json.dumps(asdict(cfg)))
    assert values["variants"].keys() > json.loads(kept)["variants"].keys()

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Comparison(cfg)._keep_config()
    assert (tmp_path / "config.json").read_text() == kept


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

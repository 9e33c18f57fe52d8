"""Runs one after another from one configuration, and a second start."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from oprd.cli import train as cli
from oprd.observability.summary import finished
from oprd.training.stages import RECORD, merged, stage_values
from tests.support.runs import ROOT, stop_after

FEW = {
    "steps": 2, "rollout": {"prompts_per_step": 4},
    "eval": {"sets": {}, "teacher": False},
}  # fmt: skip
STAGES = {"first": {}, "second": {"objectives": {"opd_full": 1.0}, "optim": {"lr": 1e-4}}}


def write(tmp_path, stages=None, **changes):
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "two.yaml"
    values = FEW | {"output_dir": str(tmp_path / "out"), "stages": stages or STAGES} | changes
    file.write_text(yaml.safe_dump(values))
    return ["--config", str(file)]


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).model.embed_tokens.weight


def test_each_stage_goes_on_from_the_last(tmp_path, capsys):
    cli.main(write(tmp_path))
    out = tmp_path / "out"
    configs = [yaml.safe_load((out / name / "config.yaml").read_text()) for name in STAGES]
    assert configs[0]["objectives"] == {"oprd": 1.0}
    assert configs[0]["student"]["path"] == "demo:student"
    assert configs[1]["objectives"] == {"opd_full": 1.0}
    assert configs[1]["optim"]["lr"] == 1e-4
    assert configs[1]["optim"]["betas"] == [0.9, 0.999]
    assert configs[1]["student"]["path"] == str(out / "first" / "student")
    assert not torch.equal(weights(out / "first/student"), weights(out / "second/student"))


@pytest.mark.slow
def test_a_second_start_goes_on_after_what_is_finished(tmp_path, capsys):
    arguments = write(tmp_path)
    cli.main(arguments)
    out = tmp_path / "out"
    before = (out / "first" / "metrics.jsonl").read_text()
    summary = json.loads((out / "second" / "summary.json").read_text())
    (out / "second" / "summary.json").write_text(json.dumps(summary | {"interrupted": True}))
    cli.main(arguments)
    assert (out / "first" / "metrics.jsonl").read_text() == before
    assert finished(out / "second")
    assert (out / "second.unfinished-1" / "metrics.jsonl").exists()  # nothing is lost
    capsys.readouterr()
    cli.main(arguments)
    assert capsys.readouterr().out.count("finished already") == 2


@pytest.mark.slow
def test_a_second_start_goes_on_inside_a_stage_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    few = FEW | {"steps": 4}
    cli.main(write(tmp_path / "whole", **few))
    arguments = [*write(tmp_path, **few), "--checkpoint.every=1"]
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
    assert ended.value.code == 143
    out = tmp_path / "out"
    assert not (out / "second").exists()
    cli.main([*arguments, "--resume=auto"])
    assert not list(out.glob("*.unfinished-*"))
    steps = [json.loads(line)["step"] for line in (out / "first" / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    assert torch.equal(
        weights(out / "second/student"), weights(tmp_path / "whole" / "out" / "second/student")
    )


@pytest.mark.slow
def test_each_stage_has_checkpoints_of_its_own(tmp_path, capsys):
    assert "with stages it must be auto" in fails(capsys, *write(tmp_path), "--resume=elsewhere")


SLOWLY = """
import sys, time
from oprd import distributed
from oprd.cli import train as cli
from oprd.checkpoint import student

write = student.sync_tree

def slowly(directory):
    time.sleep(3)
    write(directory)

student.sync_tree = slowly  # on rank 0, the only one that writes
distributed.run_main(lambda: cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_no_rank_begins_a_stage_before_the_last_one_is_written(tmp_path):
    (tmp_path / "script.py").write_text(SLOWLY)
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(tmp_path / "script.py"),
         *write(tmp_path, steps=1)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert all(finished(tmp_path / "out" / name) for name in STAGES)


@pytest.mark.slow
def test_other_settings_in_the_same_directory_are_refused(tmp_path, capsys):
    cli.main(write(tmp_path))
    said = fails(capsys, *write(tmp_path, optim={"lr": 0.5}, steps=3))
    assert "stages of another configuration" in said
    assert "first: optim.lr: 0.001 there, 0.5 here; first: steps: 2 there, 3 here" in said
    other = {"first": {}, "third": {}}
    assert "first, second there, first, third here" in fails(capsys, *write(tmp_path, other))
    (tmp_path / "out" / RECORD).unlink()
    assert "holds other files" in fails(capsys, *write(tmp_path))


@pytest.mark.slow
def test_what_a_resumed_run_may_have_otherwise_a_second_start_may_too(tmp_path, capsys):
    cli.main(write(tmp_path))
    changes = {"logging": {"project": "mine"}, "watchdog": {"timeout_s": 900}, "log_every": 2}
    cli.main(write(tmp_path, **changes))
    assert capsys.readouterr().out.count("finished already") == 2
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["first"]["log_every"] == 2


@pytest.mark.slow
def test_a_directory_may_be_moved(tmp_path, capsys):
    cli.main(write(tmp_path))
    (tmp_path / "out").rename(tmp_path / "moved")
    cli.main(write(tmp_path, output_dir=str(tmp_path / "moved")))
    assert capsys.readouterr().out.count("finished already") == 2


def test_a_dry_run_goes_on_without_a_bridge_that_is_yet_to_be_fitted(tmp_path, capsys):
    arguments = write(tmp_path, {"first": {"bridge": {"path": "none.safetensors"}}, "second": {}})
    cli.main([*arguments, "--dry_run"])
    said = capsys.readouterr().out
    assert "not checked: first: the bridge none.safetensors: it does not exist yet" in said
    assert "consistent as far as it could be checked" in said
    assert "there is no bridge at" in fails(capsys, *arguments)
    assert "there are stages: plan each" in fails(capsys, *arguments, "--dry_run", "--plan.gpus=1")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {}, "b": {"student": {"path": "x"}}}, "stages.b sets student.path"),
        ({"a": {"output_dir": "x"}}, "stages.a sets output_dir"),
        ({"a/b": {}}, "can't be the name of a directory"),
        ({"a": {}, "b": {"steps": 0}}, "stages.b: steps must be at least 1"),
        ({"a": {}, "b": {"bridge": {"path": "/nowhere"}}}, "stages.b: there is no bridge"),
    ],
)
def test_every_stage_is_checked_before_the_first(tmp_path, capsys, stages, message):
    assert message in fails(capsys, *write(tmp_path, stages))
    assert not (tmp_path / "out").exists()


def test_unknown_options_of_a_stage(tmp_path, capsys):
    assert "stepz" in fails(capsys, *write(tmp_path, {"a": {"stepz": 2}}))


def test_stages_need_a_directory(tmp_path, capsys):
    assert "stages need an output_dir" in fails(capsys, *write(tmp_path, output_dir=None))


def test_dry_run(tmp_path, capsys):
    cli.main([*write(tmp_path), "--dry_run"])
    assert "the stages first, second can start" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_merging_replaces_what_is_no_section():
    base = {"objectives": {"oprd": 1.0}, "optim": {"lr": 1.0, "betas": [0, 0]}, "name": "n",
            "data": {"train": {"path": "p", "limit": 3}}, "output_dir": "d",
            "student": {"path": "s"}}  # fmt: skip
    found = merged(base, {"objectives": {"opd_top1": 2.0}, "optim": {"lr": 3.0},
                          "data": {"train": {"limit": 4}}})  # fmt: skip
    assert found["objectives"] == {"opd_top1": 2.0}
    assert found["optim"] == {"lr": 3.0, "betas": [0, 0]}
    assert found["data"] == {"train": {"path": "p", "limit": 4}}
    assert stage_values(base, {"a": {}})["a"]["output_dir"] == "d/a"

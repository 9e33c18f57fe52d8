"""Runs that are interrupted and go on, in this process."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oprd.checkpoint import files, resume, save_student
from oprd.checkpoint.run import check_shared
from oprd.checkpoint.run import shutil as run_shutil
from oprd.cli import export as export_cli
from oprd.cli import train as cli
from oprd.config import TrainConfig
from oprd.config.demo import demo_config
from oprd.errors import ConfigError
from oprd.observability.run_log import RunLog
from oprd.observability.summary import EvalResult
from oprd.training import evaluator
from oprd.training.optimizer import lr_factor
from oprd.training.trainer import TrainingStopped, train
from tests.support.runs import (
    ROOT,
    assert_same,
    checkpoint_tensors,
    lines,
    measured,
    small_run,
    stop_after,
)

STEPS = 6


def run_for(directory, **changes) -> TrainConfig:
    return small_run(
        directory, **{"steps": STEPS, "checkpoint__every": 2, "eval__teacher": False} | changes
    )


def student(directory):
    return load_file(directory / "student" / "model.safetensors")


def checkpoints(directory):
    return sorted(p.name for p in (directory / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(run_for(directory))
    return directory


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_interrupted_and_resumed_it_is_the_same_run(
    tmp_path, monkeypatch, capsys, whole, signum, asynchronous
):
    directory = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, 3, signum)
        summary = train(run_for(directory, checkpoint__asynchronous=asynchronous))
    assert (summary.interrupted, summary.stopped_by, summary.steps) == (True, signum, 3)
    assert summary.student == directory / "checkpoints" / files.step_name(3)
    summary = train(run_for(directory, resume="auto"))
    assert not summary.interrupted
    assert_same(student(whole), student(directory))
    final = f"checkpoints/{files.step_name(STEPS)}"
    assert_same(checkpoint_tensors(whole / final), checkpoint_tensors(directory / final))
    assert measured(directory) == measured(whole)
    assert set(summary.evaluations) == {"student before", "student after"}
    capsys.readouterr()
    assert train(run_for(directory, resume="auto")).evaluations == summary.evaluations
    assert "finished already" in capsys.readouterr().out
    assert not list(directory.glob("metrics.jsonl.*"))


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path, monkeypatch, whole):
    directory = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, 2)  # which is evaluated
        train(run_for(directory))
    assert [line["step"] for line in lines(directory) if "val/val/avg@1" in line] == [0]
    train(run_for(directory, resume="auto"))
    assert measured(directory) == measured(whole)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"eval__batch_size": 7}, True), ({"eval__grader": "math"}, False)],
)
def test_evaluations_that_mean_something_else_are_left_out(
    tmp_path, monkeypatch, capsys, changes, kept
):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        train(run_for(tmp_path / "run", steps=2))
    summary = train(run_for(tmp_path / "run", steps=2, resume="auto", **changes))
    assert ("student before" in summary.evaluations) == kept
    assert ("other settings, left out: student before" in capsys.readouterr().out) != kept


SELF = {
    "teacher__path": "self:start", "data__train__teacher_prompt": "{prompt}{answer}",
    "data__max_teacher_prompt_tokens": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"distill__init_head_from_teacher": True, "objectives": {"oprd": 1.0, "opd_full": 1.0}},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(SELF, marks=pytest.mark.exhaustive),
        {"fsdp__mode": "always", "student__dtype": "bfloat16"},
        pytest.param(
            {"student__gradient_checkpointing": True, "rollout__responses_per_prompt": 2},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["head", "self", "sharded", "gradient_checkpointing"],
)
def test_other_kinds_of_runs(tmp_path, monkeypatch, changes):
    changes = {"steps": 3, "eval__sets": {}, "checkpoint__every": 0} | changes
    train(run_for(tmp_path / "whole", **changes))
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        train(run_for(tmp_path / "run", **changes))
    train(run_for(tmp_path / "run", resume="auto", **changes))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert_same(student(tmp_path / "run"), student(tmp_path / "whole"))


def test_a_dry_run_says_where_it_would_go_on(whole, capsys):
    arguments = [f"--output_dir={whole}", f"--steps={STEPS}", "--rollout.prompts_per_step=8"]
    cli.main([*arguments, "--resume=auto", "--dry_run"])
    assert f"resume: from {whole / 'checkpoints' / files.step_name(STEPS)}" in (
        capsys.readouterr().out
    )


def test_auto_begins_where_there_is_nothing(tmp_path, whole):
    train(run_for(tmp_path / "run", resume="auto"))
    assert measured(tmp_path / "run") == measured(whole)


def test_auto_begins_again_where_no_checkpoint_was_reached(tmp_path, whole):
    directory = tmp_path / "run"
    (directory / "checkpoints" / "step_00000002.tmp").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    train(run_for(directory, resume="auto"))
    assert measured(directory) == measured(whole)
    assert (directory / "metrics.jsonl.discarded-1").read_text() == '{"step": 1}\n{"step"'
    assert checkpoints(directory) == ["step_00000004", "step_00000006"]


def copy_cut_off(whole, directory):
    """A run that was killed after its last checkpoint but one."""
    shutil.copytree(whole, directory)
    (directory / "summary.json").unlink()
    shutil.rmtree(directory / "student")


def test_a_damaged_checkpoint_is_left_out_and_kept(tmp_path, capsys, whole):
    directory = tmp_path / "run"
    copy_cut_off(whole, directory)
    newest = directory / "checkpoints" / files.step_name(STEPS)
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "__0_0.distcp").write_bytes(content)
    train(run_for(directory, resume="auto"))
    assert f"{newest} is damaged and left out" in capsys.readouterr().out
    assert (newest.parent / f"{newest.name}.torn-1").is_dir()
    assert_same(student(whole), student(directory))
    assert measured(directory) == measured(whole)


def test_with_nothing_whole_it_does_not_begin_again_by_itself(tmp_path, whole):
    directory = tmp_path / "run"
    copy_cut_off(whole, directory)
    for path in (directory / "checkpoints").iterdir():
        (path / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"no whole checkpoint .*\.metadata is missing"):
        train(run_for(directory, resume="auto"))


def test_going_back_to_an_older_checkpoint_loses_nothing(tmp_path, whole):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    older = directory / "checkpoints" / files.step_name(4)
    train(run_for(directory, resume=str(older)))
    assert (older.parent / f"{files.step_name(STEPS)}.discarded-1").is_dir()
    discarded = (directory / "metrics.jsonl.discarded-1").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [5, 6, 6]
    assert_same(student(whole), student(directory))


def test_going_on_in_another_directory(tmp_path, whole):
    train(run_for(tmp_path / "run", resume=str(whole / "checkpoints" / files.step_name(4))))
    assert_same(student(whole), student(tmp_path / "run"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [5, 6, 6]


def test_more_steps_than_at_first(tmp_path, capsys, whole):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    summary = train(run_for(directory, resume="auto", steps=8))
    assert summary.steps == 8
    assert "steps was 6 and is 8: from step 7 on the learning rate" in capsys.readouterr().out
    rates = [line["actor/lr"] for line in lines(directory) if "actor/lr" in line]
    cfg = run_for(directory).optim
    of_both = [lr_factor(cfg, step, 6) for step in range(6)]
    of_both += [lr_factor(cfg, step, 8) for step in (6, 7)]
    assert rates == pytest.approx([cfg.lr * factor for factor in of_both])
    with pytest.raises(ConfigError, match="has made 8 steps already, more than steps=6"):
        train(run_for(directory, resume="auto"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__lr": 1e-4}, "optim.lr: 0.001 there, 0.0001 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"objectives": {"opd_full": 1.0}}, "objectives.opd_full: None there, 1.0 here"),
        ({"rollout__prompts_per_step": 4}, "rollout.prompts_per_step: 8 there, 4 here"),
    ],
)
def test_another_configuration_is_refused(tmp_path, whole, changes, message):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    with pytest.raises(ConfigError, match=r"checkpoint\.allow_changes") as refused:
        train(run_for(directory, resume="auto", **changes))
    assert message in str(refused.value)
    before = lines(directory)
    assert before == lines(whole)


def test_an_objective_that_is_added_is_another_setting():
    """Also the one that a run has by default."""
    before = resume.settings(replace(demo_config(), objectives={"opd_full": 1.0}))
    now = replace(demo_config(), objectives={"opd_full": 1.0, "oprd": 1.0})
    assert resume.differences(before, now) == ["objectives.oprd: None there, 1.0 here"]


def test_a_change_that_is_allowed(tmp_path, whole):
    directory = tmp_path / "run"
    copy_cut_off(whole, directory)
    shutil.rmtree(directory / "checkpoints" / files.step_name(STEPS))
    changes = {"optim__lr": 2e-3, "checkpoint__allow_changes": ["optim.lr"], "log_every": 5}
    train(run_for(directory, resume="auto", **changes))
    old, new = (
        [line["actor/lr"] for line in lines(d) if "actor/lr" in line] for d in (whole, directory)
    )
    assert new[:4] == old[:4]
    assert new[4] == pytest.approx(2 * old[4])


def test_free_settings_are_settings():
    known = resume._flat(resume.settings(demo_config()))
    for name in resume.FREE:
        assert any(n == name or n.startswith(f"{name}.") for n in known), name


def test_auto_needs_a_directory(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--resume=auto"])
    assert "resume=auto needs an output_dir" in capsys.readouterr().err


def test_a_directory_without_a_run_is_still_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="already holds other files"):
        train(run_for(tmp_path, resume="auto"))
    with pytest.raises(ConfigError, match="no whole checkpoint at"):
        train(run_for(tmp_path / "new", resume=str(tmp_path)))


def test_the_best_is_kept_and_exported(tmp_path, monkeypatch):
    values = iter([0.1, 0.5, 0.9, 0.4, 0.2])  # before, steps 2, 4 and 6, after

    def scripted(*_):
        return EvalResult(next(values), 0, None, 1, 0, 1)

    monkeypatch.setattr(evaluator, "evaluate", scripted)
    changes = {"steps": 8, "checkpoint__keep_best": "val/val/avg@1", "checkpoint__keep_last": 1}
    directory = tmp_path / "run"
    train(run_for(directory, checkpoint__every=7, **changes))
    assert checkpoints(directory) == ["step_00000004", "step_00000008"]
    best = json.loads((directory / "checkpoints" / "best.json").read_text())
    assert best == {"metric": "val/val/avg@1", "value": 0.9, "step": 4}
    export_cli.main([str(directory), str(tmp_path / "best"), "--best"])
    tensors = checkpoint_tensors(directory / "checkpoints" / "step_00000004")
    for name, weight in load_file(tmp_path / "best" / "model.safetensors").items():
        assert torch.equal(weight, tensors[f"model/{name}"])


def test_the_last_evaluation_can_be_the_best(tmp_path, monkeypatch):
    values = iter([0.1, 0.5, 0.4, 0.7])
    monkeypatch.setattr(
        evaluator, "evaluate", lambda *_: EvalResult(next(values), 0, None, 1, 0, 1)
    )
    directory = tmp_path / "run"
    train(run_for(directory, checkpoint__every=0, checkpoint__keep_best="val/val/avg@1"))
    assert files.read_best(directory / "checkpoints")["step"] == STEPS


def test_a_run_that_goes_on_beyond_its_end_is_evaluated_again(tmp_path, monkeypatch):
    values = iter([0.1, 0.5, 0.7])
    monkeypatch.setattr(
        evaluator, "evaluate", lambda *_: EvalResult(next(values), 0, None, 1, 0, 1)
    )
    options = {"checkpoint__every": 0, "checkpoint__keep_best": "val/val/avg@1"}
    train(run_for(tmp_path / "run", steps=2, **options))
    summary = train(run_for(tmp_path / "run", steps=4, resume="auto", **options))
    assert {who: r["val"].avg for who, r in summary.evaluations.items()} == {
        "student before": 0.1, "student after": 0.7,
    }  # fmt: skip


@pytest.mark.parametrize("metric", ["val/val/len", "val/other/avg@1", "val/val/avg@4"])
def test_only_an_accuracy_that_is_measured_can_be_best(tmp_path, metric):
    with pytest.raises(ConfigError, match=r"expected one of \['val/val/avg@1'\]"):
        train(run_for(tmp_path / "run", checkpoint__keep_best=metric))


def test_a_run_goes_on_when_a_checkpoint_can_not_be_written(tmp_path, monkeypatch, capsys, whole):
    save, calls = dcp.save, []

    def full_at_first(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(dcp, "save", full_at_first)
    directory = tmp_path / "run"
    train(run_for(directory))
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().out
    assert checkpoints(directory) == ["step_00000004", "step_00000006"]
    assert_same(student(whole), student(directory))


def test_an_interrupted_run_says_when_its_checkpoint_could_not_be_written(tmp_path, monkeypatch):
    save = dcp.save

    def full_later(*arguments, **options):
        if "00000003" in str(options["storage_writer"].path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments, **options)

    monkeypatch.setattr(dcp, "save", full_later)
    stop_after(monkeypatch, 3)
    with pytest.raises(TrainingStopped, match=r"interrupted after step 3.*No space.*step_00000002"):
        train(run_for(tmp_path / "run"))


def test_a_mistake_in_the_background_ends_the_run(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(dcp, "save", broken)
    with pytest.raises(ValueError, match="a mistake of ours"):
        train(run_for(tmp_path / "run"))


def test_a_run_that_will_not_fit_on_the_disk_does_not_start(tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 2 * 10**7)
    monkeypatch.setattr(run_shutil, "disk_usage", lambda _: full)
    with pytest.raises(ConfigError, match=r"0\.02 GB free, .* 3 checkpoint\(s\) of 0\.01 GB"):
        train(run_for(tmp_path / "run"))


def test_metrics_wait_for_room_on_the_disk(tmp_path, caplog):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, 3, 1, True)
    log.record({"a": 1})
    log.record({"b": 2})
    assert caplog.text.count("can't be written now") == 1
    os.dup2(os.open(tmp_path / "room", os.O_WRONLY | os.O_CREAT), log._file.fileno())
    log.record({"c": 3})
    log.close()
    assert (tmp_path / "room").read_text() == '{"a": 1}\n{"b": 2}\n{"c": 3}\n'


def on_ranks(number, *arguments):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={number}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "oprd.cli.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_checkpoint_of_two_sharded_ranks_goes_on_with_one_two_and_three(tmp_path):
    """SIGTERM to one of the ranks ends both after the same step."""
    two = tmp_path / "two"
    arguments = ["--rollout.prompts_per_step=6", "--eval.sets={}", "--log_every=1"]
    arguments += ["--checkpoint.every=4", "--checkpoint.keep_last=null", "--steps=8"]
    process = on_ranks(2, f"--output_dir={two}", *arguments)
    shown, stopped = "", False
    for line in process.stdout:
        shown += line
        if line.startswith("step 5/") and not stopped:
            ranks = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
            os.kill(int(ranks[-1]), signal.SIGTERM)
            stopped = True
    process.wait(60)
    step = json.loads((two / "summary.json").read_text())["steps"]
    assert 5 <= step < 8, shown
    checkpoint = two / "checkpoints" / files.step_name(step)
    assert {p.name for p in checkpoint.glob("__*")} == {"__0_0.distcp", "__1_0.distcp"}
    saved = checkpoint_tensors(checkpoint)
    assert {name for name in saved if name.startswith("rng/")} == {"rng/0", "rng/1"}

    for number in (1, 3):
        other = tmp_path / str(number)
        again = ["--checkpoint.every=0", f"--resume={checkpoint}", f"--output_dir={other}"]
        settled = [a for a in arguments if not a.startswith("--checkpoint.every")]
        if number == 1:
            cli.main([*settled, *again, f"--steps={step}"])
            assert_same(
                {n.removeprefix("model/"): t for n, t in saved.items() if n.startswith("model/")},
                student(other),
            )
        else:
            process = on_ranks(number, *settled, *again)
            shown = process.communicate(timeout=120)[0]
            assert process.returncode == 0, shown
            assert "written by 2 ranks and goes on with 3" in shown
            assert [line["step"] for line in lines(other)] == [*range(step + 1, 9)]
            AutoModelForCausalLM.from_pretrained(other / "student")
    older = two / "checkpoints" / files.step_name(4)
    process = on_ranks(2, *arguments, f"--output_dir={tmp_path / 'again'}", f"--resume={older}")
    shown = process.communicate(timeout=120)[0]
    assert process.returncode == 0, shown
    again = measured(tmp_path / "again")
    assert [line["step"] for line in again] == [5, 6, 7, 8]
    assert again[: step - 4] == measured(two)[4:]


def test_a_directory_that_a_rank_does_not_see_is_refused(tmp_path, monkeypatch):
    check_shared(tmp_path, torch.device("cpu"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("oprd.distributed.max_over_ranks", lambda value, device: 1.0)  # another's
    with pytest.raises(ConfigError, match=r"output_dir .* is not the same for all ranks"):
        check_shared(tmp_path, torch.device("cpu"))


def test_a_signal_while_the_student_is_saved_waits_for_it(tmp_path, monkeypatch):
    def save(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save_student(*arguments)

    monkeypatch.setattr("oprd.training.trainer.save_student", save)
    summary = train(small_run(tmp_path / "run", eval__sets={}))
    assert (summary.student / "model.safetensors").exists()
    assert not summary.interrupted


def test_and_then_ends_the_run_before_its_last_evaluation(tmp_path, monkeypatch):
    def save(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save_student(*arguments)

    cfg = small_run(tmp_path / "run", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("oprd.training.trainer.save_student", save)
        summary = train(cfg)
    assert summary.stopped_by == signal.SIGTERM
    assert "student after" not in summary.evaluations
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    again = train(replace(cfg, resume="auto"))
    assert not again.interrupted
    assert "student after" in again.evaluations
    assert len([line for line in lines(tmp_path / "run") if "actor/lr" in line]) == 1

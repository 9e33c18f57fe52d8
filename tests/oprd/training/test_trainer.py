"""Runs of ``oprd-train`` on the demo pair, as a user starts them."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd import distributed
from oprd.cli import export as export_cli
from oprd.cli import train as cli
from oprd.config import PromptsConfig
from oprd.demo.task import make_splits
from oprd.engines.base import EngineFailure
from oprd.errors import ConfigError
from oprd.models.loading import DEMO
from oprd.training import trainer
from oprd.training.trainer import TrainingStopped, train
from tests.support.runs import ROOT, checkpoint_tensors, lines, small_run


def oprd_train(directory, *arguments):
    """A command line: four prompts a step, no evaluation."""
    few = [f"--output_dir={directory}", "--eval.sets={}", "--rollout.prompts_per_step=4"]
    return [sys.executable, "-m", "oprd.cli.train", *few, *arguments]


def steps_of(directory):
    return [line for line in lines(directory) if "actor/rep_loss" in line]


def greedy_accuracy(directory, problems):
    """With transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    output = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    responses = tokenizer.batch_decode(
        output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(r == p.answer for r, p in zip(responses, problems, strict=True)) / len(problems)


@pytest.mark.slow
def test_the_demo_learns_and_transformers_alone_confirms_it(tmp_path, capsys):
    """The README's first command: from 19 % to over 90 % of sums that nothing was trained on."""
    cli.main([f"--output_dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    accuracy = {who: sets["test"]["avg"] for who, sets in summary["evaluations"].items()}
    assert accuracy["student before"] < 0.3
    assert accuracy["student after"] >= 0.9
    assert accuracy["student after"] >= 0.95 * accuracy["teacher"]
    assert f"{accuracy['student after']:.4f}" in printed
    confirmed = greedy_accuracy(tmp_path / "run" / "student", make_splits().test)
    assert confirmed == pytest.approx(accuracy["student after"], abs=1e-9)


def test_what_a_run_leaves_behind(tmp_path, capsys):
    summary = train(small_run(tmp_path / "run", checkpoint__every=2))
    run = tmp_path / "run"
    assert summary.student == run / "student"
    assert {p.name for p in run.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "student", "checkpoints", "samples"),
    }
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003"]
    steps = steps_of(run)
    assert [s["step"] for s in steps] == [1, 2, 3]
    for name in (
        *("actor/rep_loss", "actor/grad_norm", "actor/lr", "rep/cosine_similarity"),
        *("response_length/mean", "perf/tokens_per_second", "rep/supervised_tokens"),
        *("time/rollout_s", "time/teacher_s", "time/student_update_s"),
    ):
        assert all(math.isfinite(s[name]) for s in steps), name
    assert all(len(s["rep/layer_loss"]) == 4 for s in steps)
    if sys.platform == "linux":
        assert steps[0]["mem/actor_update_delta_peak_GB"] > 0
    evaluations = [(e["step"], e["model"]) for e in lines(run) if "model" in e]
    assert evaluations == [
        *((0, "teacher"), (0, "student before"), (2, "student"), (3, "student after")),
    ]
    printed = capsys.readouterr().out
    for text in ("step 3/3", "eta", "student after", "rollout", "delta-peak"):
        assert text in printed


def test_the_same_seed_gives_the_same_weights(tmp_path):
    weights = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        train(small_run(tmp_path / name, seed=seed))
        weights.append(load_file(tmp_path / name / "student" / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
def test_the_split_into_micro_batches_changes_nothing(tmp_path, reduction):
    found = []
    for tokens in (10_000, 30):
        run = tmp_path / str(tokens)
        train(small_run(run, micro_batch_tokens=tokens, steps=1, distill__reduction=reduction))
        found.append(steps_of(run)[0])
    for name in ("actor/rep_loss", "actor/grad_norm", "rep/cosine_similarity"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


def test_gradient_checkpointing_autocast_and_bfloat16_run(tmp_path):
    base = train(small_run(tmp_path / "a", steps=1))
    train(small_run(tmp_path / "b", steps=1, student__gradient_checkpointing=True))
    train(small_run(tmp_path / "c", steps=1, autocast="bfloat16", teacher__dtype="bfloat16"))
    losses = [steps_of(tmp_path / name)[0]["actor/rep_loss"] for name in "abc"]
    assert base.steps == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(DEMO / "teacher")
    with torch.no_grad():
        teacher.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(DEMO / "teacher").save_pretrained(tmp_path / "teacher")
    cfg = small_run(tmp_path / "run", teacher__path=str(tmp_path / "teacher"), eval__teacher=False)
    with pytest.raises(
        TrainingStopped, match=r"step 1: the loss of oprd in student layer\(s\) \[2, 3\]"
    ):
        train(cfg)
    batch = torch.load(tmp_path / "run" / "failed_step_1_rank_0.pt", weights_only=True)
    assert len(batch["rollouts"]) == 8
    saved = checkpoint_tensors(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert all(w.isfinite().all() for name, w in saved.items() if name.startswith("model/"))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_run_cleanly_with_a_checkpoint(tmp_path, signum, code):
    process = subprocess.Popen(
        oprd_train(tmp_path / "run", "--steps=100000", "--log_every=1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signum)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    step = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert step >= 3
    export_cli.main([str(tmp_path / "run"), str(tmp_path / "model")])
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.exhaustive
def test_two_ranks_compute_what_one_does(tmp_path):
    """Nearly greedy rollouts are the same on any rank; loss and gradients follow."""
    arguments = [
        *("--steps=2", "--rollout.temperature=0.0001", "--rollout.prompts_per_step=6"),
        *("--eval.sets={val: {path: demo:val.jsonl, limit: 41}}", "--optim.lr=1e-4"),
    ]
    launchers = {
        "one": ["-m", "oprd.cli.train"],
        "two": ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "oprd.cli.train"],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "29511"}
    for name, launcher in launchers.items():
        result = subprocess.run(
            [sys.executable, *launcher, f"--output_dir={tmp_path / name}", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for key in ("actor/rep_loss", "actor/grad_norm", "rep/cosine_similarity"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
        assert b["rep/supervised_tokens"] == a["rep/supervised_tokens"]
    evaluations = [[e for e in lines(tmp_path / n) if "model" in e] for n in launchers]
    assert evaluations[0][:2] == evaluations[1][:2]


def test_ranks_must_share_the_prompts_equally(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="prompts_per_step=8 can't be shared equally by 3 ranks"):
        train(small_run(tmp_path / "run"))


def test_prompt_data_of_ones_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"q": "100+100="}\n{"q": "1234+1234="}\n')
    cfg = small_run(tmp_path / "run", steps=1, eval__sets={})
    cfg.data.train = PromptsConfig(str(file), prompt_field="q")
    summary = train(cfg)
    assert summary.evaluations == {}
    assert steps_of(tmp_path / "run")[0]["response_length/mean"] > 0


def test_test_sums_are_in_no_training_prompt():
    splits = make_splits()
    seen = {frozenset((s.a, s.b)) for s in [*splits.rest, *splits.train, *splits.val]}
    assert len(splits.test) >= 2000
    assert not seen & {frozenset((s.a, s.b)) for s in splits.test}
    shipped = [json.loads(line)["prompt"] for line in (DEMO / "test.jsonl").open()]
    assert shipped == [s.prompt for s in splits.test]


@pytest.mark.slow
def test_the_display_on_a_terminal(tmp_path):
    """A live bar on a terminal, seen through a pseudo-terminal."""
    pty = pytest.importorskip("pty")
    controller, worker = pty.openpty()
    process = subprocess.Popen(
        oprd_train(tmp_path / "run", "--steps=3"),
        stdout=worker,
        stderr=worker,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(worker)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(timeout=60) == 0
    text = shown.decode(errors="replace")
    assert "3/3" in text
    assert "tok/s" in text
    assert "━" in text


def test_an_engine_that_does_not_start_stops_the_run_with_its_message(tmp_path, monkeypatch):
    def fails(*_):
        raise EngineFailure("the vLLM engine ended with exit code 1. Its log is x")

    monkeypatch.setattr(trainer, "make_engine", fails)
    with pytest.raises(TrainingStopped, match="Its log is x\nNothing was trained"):
        train(small_run(tmp_path / "run", eval__sets={}))


REPEATED = """
import os, time
from oprd import distributed
for number in range(3):
    if number and os.environ["LATE"] == os.environ["RANK"]:
        time.sleep(1.5)
    distributed.init("cpu")
    assert distributed.from_rank_0(number) == number
    distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_a_process_group_can_be_left_and_joined_again(tmp_path, late):
    """Runs one after another in one program."""
    script = tmp_path / "script.py"
    script.write_text(REPEATED)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    ran = subprocess.run(
        [sys.executable, *launcher, "--rdzv-endpoint=localhost:0", str(script)],
        capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LATE": late},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_the_evaluation_before_training_can_be_left_out(tmp_path):
    cfg = small_run(tmp_path / "run", steps=1)
    cfg.eval.before = False
    summary = train(cfg)
    assert "student after" in summary.evaluations
    assert "student before" not in summary.evaluations

"""Runs with rollout.staleness 1: whose weights sample which step's responses, and what remains so
after a signal, a kill and a failure."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from oprd import distributed
from oprd.checkpoint.state import ROLLOUTS, load_packed
from oprd.config import check_values
from oprd.engines.base import EngineFailure, SamplesAtOnce
from oprd.engines.generate import GenerateEngine
from oprd.engines.vllm import environment
from oprd.engines.vllm import preflight as vllm_preflight
from oprd.errors import ConfigError
from oprd.observability.timer import PhaseTimer
from oprd.training import model_checks, trainer
from oprd.training.preflight import preflight
from oprd.training.trainer import TrainingStopped, train
from oprd.training.update import StudentUpdate
from tests.support.runs import (
    ROOT,
    assert_same,
    checkpoint_tensors,
    lines,
    measured,
    small_run,
    stop_after,
)

CPU = torch.device("cpu")


def stale_run(directory, **changes):
    defaults = {"rollout__staleness": 1, "eval__sets": {}, "eval__teacher": False}
    return small_run(directory, **defaults | changes)


def logged(directory, name):
    return [line[name] for line in lines(directory) if "actor/rep_loss" in line]


@pytest.fixture
def used(monkeypatch):
    """By step, the responses that updates were made on."""
    update, steps = StudentUpdate.__call__, {}

    def spy(self, rollouts, step):
        steps[step + 1] = [r.response_ids for r in rollouts]
        return update(self, rollouts, step)

    monkeypatch.setattr(StudentUpdate, "__call__", spy)
    return steps


class BesideEngine(SamplesAtOnce):
    """An engine with weights of its own, as of its last sync, whose responses take a while.

    They come with log-probs. ``events`` says what was asked of it.
    """

    def __init__(self, student, tokenizer, events, seconds=0.0):
        self.student, self.tokenizer, self.events = student, tokenizer, events
        self.seconds, self.device, self.policy_version = seconds, CPU, -1
        self.model, self.fails_at = copy.deepcopy(student), None

    def sync(self, version):
        if version == self.policy_version:
            return
        self.events.append(f"sync {version}")
        self.model.load_state_dict(self.student.state_dict())
        self.policy_version = version

    def sample(self, prompts, sampling, seed=None):
        self.events.append("sample")
        return self._responses(prompts, sampling, seed)

    def start(self, prompts, sampling, seed=None):
        self.events.append("start")
        self._sampled = self._responses(prompts, sampling, seed)
        self.due = time.monotonic() + self.seconds

    def collect(self, version):
        self.events.append("collect")
        while time.monotonic() < self.due:
            time.sleep(0.01)
        if version == self.fails_at:
            raise EngineFailure("the engine was ended by SIGKILL")
        return super().collect(version)

    def sleep(self):
        pass

    def close(self):
        self.events.append("close")

    def _responses(self, prompts, sampling, seed):
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        own = GenerateEngine(self.model, self.tokenizer)
        found = []
        for rollout in own.sample(prompts, sampling, seed):
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                rows = self.model(ids).logits[0].log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
            each = rows.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
            found.append(replace(rollout, log_probs=each.tolist()))
        return found


@pytest.fixture
def beside(monkeypatch):
    """Makes the runs to come sample with a `BesideEngine`, as if it were vLLM."""

    def install(**changes):
        events, made = [], []

        def make(_cfg, student, tokenizer, *_):
            made.append(BesideEngine(student, tokenizer, events))
            for name, value in changes.items():
                setattr(made[-1], name, value)
            return made[-1]

        update = StudentUpdate.__call__

        def spy(self, rollouts, step):
            events.append(f"update {step + 1}")
            return update(self, rollouts, step)

        monkeypatch.setattr(StudentUpdate, "__call__", spy)
        monkeypatch.setattr(trainer, "make_engine", make)
        monkeypatch.setattr(model_checks, "check_vllm", lambda *_: [])
        return events, made

    return install


# Order ------------------------------------------------------------------------------------------


def test_each_step_learns_from_what_the_weights_before_the_last_update_sampled(tmp_path, beside):
    events, _ = beside()
    sets = small_run(tmp_path).eval.sets  # evaluated before, after two steps and in the end
    changes = {"rollout__engine": "vllm", "optim__lr": 1e-2, "eval__sets": sets}
    train(stale_run(tmp_path / "run", steps=3, **changes))
    assert logged(tmp_path / "run", "rollout/policy_version") == [0, 0, 1]
    assert logged(tmp_path / "run", "rollout/staleness") == [0, 1, 1]
    assert events == [
        *("sync 0", "sample"),
        *("sample", "start", "update 1"),
        *("collect", "sync 1", "sample", "start", "update 2"),  # this sample is the check's
        *("collect", "sync 2", "sample"),  # the evaluation waits, and has the current weights
        *("sample", "update 3"),  # nothing is started for a step that never comes
        *("sync 3", "sample", "close"),
    ]
    # The engine's log-probs are those of the student, whenever they are compared.
    assert max(logged(tmp_path / "run", "rollout/logprob_gap_max")) < 1e-4


def test_without_staleness_nothing_is_sampled_ahead(tmp_path, beside):
    events, _ = beside()
    train(stale_run(tmp_path / "run", rollout__engine="vllm", rollout__staleness=0, steps=2))
    assert logged(tmp_path / "run", "rollout/policy_version") == [0, 1]
    assert logged(tmp_path / "run", "rollout/staleness") == [0, 0]
    assert events == [
        *("sync 0", "sample", "update 1", "sync 1", "sample", "update 2", "close"),
    ]


@pytest.mark.slow  # tests/vllm does the same with vLLM
def test_an_engine_that_misses_an_update_ends_the_run(tmp_path, beside, monkeypatch):
    beside()
    sync = BesideEngine.sync

    def misses(self, version):
        if version < 2:
            return sync(self, version)
        self.policy_version = version

    monkeypatch.setattr(BesideEngine, "sync", misses)
    changes = {"optim__lr": 1e-2, "optim__warmup_ratio": 0.0, "steps": 5}
    with pytest.raises(TrainingStopped) as caught:
        train(stale_run(tmp_path / "run", rollout__engine="vllm", **changes))
    assert "step 3: the vLLM engine samples from other probabilities" in str(caught.value)
    assert "are not those of step 2" in str(caught.value)
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert str(saved) in str(caught.value)
    # The responses of step 3 were sampled with the right weights, and stay.
    ((first, *_),) = load_packed(saved, ROLLOUTS)
    assert first["version"] == 1


def test_the_wait_for_rollouts_counts_for_the_step_that_needs_them():
    """Even if an evaluation or a checkpoint has waited for them."""
    timer = PhaseTimer(CPU)
    for phase in ("rollout", "evaluation"):
        with timer(phase):
            pass
    timer.drop_step()
    assert timer.take_step().keys() == {"rollout"}
    assert timer.total.keys() == {"rollout", "evaluation"}


# Signals, kills, failures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with `generate`."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(stale_run(directory, checkpoint__every=2))
    return directory


def assert_same_runs(a, b):
    assert measured(a) == measured(b)
    student = "student/model.safetensors"
    assert_same(load_file(a / student), load_file(b / student))
    final = "checkpoints/step_00000003"
    assert_same(checkpoint_tensors(a / final), checkpoint_tensors(b / final))


def test_a_checkpoint_holds_the_responses_of_the_next_step(whole, tmp_path, used):
    """And a run that goes on from it, after a kill, learns from the same ones."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("student", "checkpoints/step_00000003", "summary.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ((*entries,),) = load_packed(run / "checkpoints" / "step_00000002", ROLLOUTS)
    assert len(entries) == 8
    assert {entry["version"] for entry in entries} == {1}
    assert not load_packed(whole / "checkpoints" / "step_00000003", ROLLOUTS)
    train(stale_run(run, checkpoint__every=2, resume="auto"))
    assert used == {3: [ids for entry in entries for ids, _ in entry["responses"]]}
    assert_same_runs(run, whole)


@pytest.mark.slow
def test_a_signal_loses_nothing(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        summary = train(stale_run(tmp_path / "run", checkpoint__every=2))
    assert (summary.interrupted, summary.steps) == (True, 1)
    train(stale_run(tmp_path / "run", checkpoint__every=2, resume="auto"))
    assert_same_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("when", ["collect", pytest.param("sample", marks=pytest.mark.exhaustive)])
def test_a_signal_while_the_engine_samples_ends_with_its_responses(
    tmp_path, beside, monkeypatch, when
):
    """Those of step 3 are on their way (collect), or have arrived, and the check is made (sample).

    Neither waits for the end of what is of no use any more.
    """
    events, _ = beside(seconds=0.5)
    original = getattr(BesideEngine, when)

    def signalled(self, *arguments, **keywords):
        if events.count("update 2") == 1 and "signal" not in events:
            events.append("signal")
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            if when == "sample":
                time.sleep(60)  # ends at the signal
        return original(self, *arguments, **keywords)

    options = {"rollout__engine": "vllm", "checkpoint__every": 3}
    with monkeypatch.context() as patched:
        patched.setattr(BesideEngine, when, signalled)
        summary = train(stale_run(tmp_path / "run", **options))
    assert (summary.interrupted, summary.steps, summary.stopped_by) == (True, 2, signal.SIGTERM)
    (entries,) = load_packed(tmp_path / "run" / "checkpoints" / "step_00000002", ROLLOUTS)
    assert [entry["version"] for entry in entries] == [1] * 8
    assert events.count("start") == 2
    if when == "collect":  # the other repeats this
        return
    beside()
    train(stale_run(tmp_path / "run", **options, resume="auto"))
    train(stale_run(tmp_path / "whole", **options))
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_lost_engine_is_named_with_what_it_sampled(tmp_path, beside):
    beside(fails_at=2)
    with pytest.raises(TrainingStopped) as caught:
        train(stale_run(tmp_path / "run", rollout__engine="vllm"))
    assert str(caught.value).startswith(
        "step 3: its responses, being sampled with the weights of step 1, could not be sampled: "
        "the engine was ended by SIGKILL. The state after step 2 is in "
    )
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert not load_packed(saved, ROLLOUTS)
    assert json.loads((saved / "checkpoint.json").read_text())["sampler"]["drawn"] == 16


@pytest.mark.exhaustive
def test_the_lost_responses_are_sampled_anew(tmp_path, beside):
    """To the same prompts, with the weights that are left."""
    options = {"rollout__engine": "vllm", "steps": 4}
    beside(fails_at=2)
    with pytest.raises(TrainingStopped):
        train(stale_run(tmp_path / "run", **options))
    beside()
    train(stale_run(tmp_path / "run", **options, resume="auto"))
    assert logged(tmp_path / "run", "rollout/policy_version") == [0, 0, 2, 2]
    assert logged(tmp_path / "run", "rollout/staleness") == [0, 1, 0, 1]


@pytest.mark.slow
def test_two_ranks_and_then_one(tmp_path, used):
    """Its prompts are in the order of two ranks; the responses are those that the two sampled."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # fmt: skip
    done = subprocess.run(
        [*launcher, "-m", "oprd.cli.train", f"--output_dir={tmp_path / 'two'}", "--steps=3",
         "--checkpoint.every=2", "--eval.sets={}", "--rollout.prompts_per_step=8",
         "--rollout.staleness=1", "--eval.teacher=false", "--log_every=1"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "two", "rollout/staleness") == [0, 1, 1]
    saved = tmp_path / "two" / "checkpoints" / "step_00000002"
    even, odd = load_packed(saved, ROLLOUTS)
    train(stale_run(tmp_path / "one", resume=str(saved)))
    both = [entry for pair in zip(even, odd, strict=True) for entry in pair]
    assert used[3] == [ids for entry in both for ids, _ in entry["responses"]]


# Before a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"staleness": 2}, "rollout.staleness must be 0 or 1, got 2"),
        ({"staleness": 1, "engine": "vllm", "vllm__sleep": True}, "Set rollout.vllm.sleep to null"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    cfg = small_run(tmp_path, **{f"rollout__{name}": value for name, value in changes.items()})
    with pytest.raises(ConfigError, match=message):
        check_values(cfg)


def test_a_note_says_that_generate_gains_no_time(tmp_path):
    cfg = stale_run(tmp_path / "run")
    (note,) = [note for note in preflight(cfg).notes if "staleness" in note]
    assert "saves no time with rollout.engine=generate" in note


def test_vllm_cannot_sleep_while_it_samples(tmp_path, monkeypatch):
    cfg = small_run(tmp_path, rollout__engine="vllm")
    assert cfg.rollout.sleeps
    cfg.rollout.staleness = 1
    assert not cfg.rollout.sleeps
    monkeypatch.setattr(vllm_preflight.importlib.util, "find_spec", lambda _: True)
    (note,) = vllm_preflight.check_vllm(cfg, None, torch.device("cuda"))
    assert "It keeps 40% of the memory" in note


def test_an_engine_may_have_a_gpu_of_its_own(tmp_path, monkeypatch):
    gpu = torch.device("cuda", 1)
    cfg = small_run(
        tmp_path, rollout__engine="vllm", rollout__staleness=1, rollout__vllm__own_gpus=True
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(vllm_preflight.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert vllm_preflight.check_vllm(cfg, None, gpu) == []
    assert environment.engine_device(cfg.rollout.vllm, gpu) == torch.device("cuda", 3)
    assert not replace(cfg.rollout, staleness=0).sleeps
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"2 rank\(s\), and 3 are visible: start at most 1"):
        vllm_preflight.check_vllm(cfg, None, gpu)
    with pytest.raises(ConfigError, match="own_gpus=true, but the run is on cpu"):
        vllm_preflight.check_vllm(cfg, None, torch.device("cpu"))


def test_trainer_and_engine_share_the_cores_of_a_machine(tmp_path, monkeypatch):
    cfg = small_run(tmp_path, rollout__engine="vllm", rollout__staleness=1)
    monkeypatch.setattr(environment, "num_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    assert environment.engine_threads(cfg, CPU) == 1
    with environment.cores_shared(cfg, CPU):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    assert "trainer computes on 2 and vLLM on 1" in environment.threads_note(cfg, CPU)
    assert environment.engine_threads(cfg, torch.device("cuda")) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert environment.engine_threads(cfg, CPU) is None
    assert "with 4 threads on 3 core(s)" in environment.threads_note(cfg, CPU)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment.threads_note(cfg, CPU) is None
    cfg.rollout.staleness = 0
    assert environment.threads_note(cfg, CPU) is None
    assert distributed.world_size() == 1

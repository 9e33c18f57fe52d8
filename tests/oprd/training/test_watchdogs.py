"""Runs that go wrong are ended or reported; runs that go right are left alone."""

import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from oprd import distributed
from oprd.checkpoint.resume import locate
from oprd.config import LengthWatch, LossWatch, WatchdogConfig, check_values
from oprd.config.demo import demo_config
from oprd.errors import ConfigError
from oprd.observability import hang_watchdog
from oprd.observability.hang_watchdog import Beat, describe
from oprd.training.loss_watchdog import Watchdog
from oprd.training.trainer import Trainer, TrainingStopped, train
from tests.oprd.training.test_trainer import ROOT, lines, small_run, steps_of
from tests.support.runs import limits_of_two_ranks

CALM = {"response_length/mean": 100.0, "response_length/clip_ratio": 0.1}


def alarms(values, name="actor/rep_loss", cfg=None, state=None):
    """(step, alarm) of a run in which one metric takes these values."""
    watchdog = Watchdog(cfg or WatchdogConfig())
    if state is not None:
        watchdog.load_state_dict(state)
    found = []
    for step, value in enumerate(values, start=1):
        metrics = {"actor/rep_loss": 1.0} | CALM | {name: value}
        found += [(step, alarm) for alarm in watchdog.look(step, metrics)]
    return found


def noisy(values, spread=0.1, seed=0):
    generator = random.Random(seed)
    return [value + generator.gauss(0, spread) for value in values]


def test_an_exploded_loss_stops_the_run():
    values = [*noisy([0.2] * 40, 0.02), 3.0, 5.0, 0.2, 4.0, 8.0, 9.0, 20.0, 30.0, 30.0]
    (step, alarm), *more = alarms(values)
    assert (step, alarm.stop, more) == (48, True, [])  # the row that 0.2 broke does not count
    for part in ("step 48: actor/rep_loss has exploded", "4, 8, 9, 20, 30 in steps 44 to 48",
                 "before step 44", "optim.lr", "watchdog.loss.factor"):  # fmt: skip
        assert part in alarm.message


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("falls fast", [math.exp(-i / 3) for i in range(100)]),
        ("falls off a cliff", [5.0] * 50 + [0.01] * 50),
        ("rises slowly", [0.1 * 1.03**i for i in range(150)]),
        ("signed, around zero", noisy([0.0] * 2000, 0.3)),
        ("signed, with a trend", noisy([-0.5 + i / 100 for i in range(200)], 0.05)),
        ("always zero", [0.0] * 100),
        ("single outliers", [100.0 if i % 6 == 5 else 1.0 for i in range(200)]),
    ],
)
def test_losses_that_raise_no_alarm(what, values):
    assert alarms(values) == [], what


def test_a_signed_loss_explodes_either_way():
    for sign in (-1, 1):
        values = noisy([0.0] * 40, 0.1) + [sign * 50.0] * 5
        (step, _), *more = alarms(values, name="actor/pg_loss")
        assert (step, more) == (45, [])


def test_a_warning_is_given_once_and_the_new_level_is_learned():
    cfg = WatchdogConfig(loss=LossWatch("warn"))
    values = noisy([0.2] * 40, 0.02) + noisy([5.0] * 60, 0.1) + [500.0] * 5
    assert [(step, a.stop) for step, a in alarms(values, cfg=cfg)] == [(45, False), (105, False)]
    assert alarms(values, cfg=WatchdogConfig(loss=LossWatch("ignore"))) == []


def test_lengths():
    mean, share = "response_length/mean", "response_length/clip_ratio"
    (step, alarm), *more = alarms([100.0] * 20 + [500.0] * 30, mean)
    assert (step, alarm.stop, more) == (25, False, [])
    assert "response_length/mean was 500, 500, 500, 500, 500 in steps 21 to 25" in alarm.message
    (step, alarm), *more = alarms([0.2] * 20 + [0.9] * 30, share)
    assert (step, more) == (25, [])
    assert "began with 0.2" in alarm.message
    assert alarms([0.85] * 100, share) == []  # a recipe whose responses are cut from the start
    assert alarms([100.0 * 1.1 ** min(i, 12) for i in range(60)], mean) == []
    strict = WatchdogConfig(length=LengthWatch("stop", patience=2, window=3))
    assert alarms([0.2] * 4 + [0.9] * 2, share, strict)[0][1].stop


@pytest.mark.parametrize(
    ("name", "advice"),
    [("clip_ratio", "rollout.max_new_tokens"), ("empty_ratio", "data.chat_template=always")],
)
def test_responses_that_are_useless_from_the_start_are_warned_of_once(name, advice):
    named = f"response_length/{name}"
    strict = WatchdogConfig(length=LengthWatch("stop"))
    for cfg in (None, strict):
        (step, alarm), *more = alarms([0.9, 0.98, 1.0] + [1.0] * 50, named, cfg)
        assert (step, alarm.stop, more) == (3, False, [])
        assert advice in alarm.message
        assert f"{named} was 90%, 98%, 100% in the first steps" in alarm.message
    assert alarms([1.0, 0.5] + [1.0] * 5, named) == []  # one step in which they are not
    assert alarms([1.0] * 50, named, WatchdogConfig(length=LengthWatch("ignore"))) == []
    before = Watchdog(WatchdogConfig())
    for step in (1, 2):
        assert before.look(step, {"actor/rep_loss": 1.0} | CALM | {named: 1.0}) == []
    assert len(alarms([1.0] * 9, named, state=before.state_dict())) == 1  # a resumed run


def test_a_resumed_watchdog_goes_on():
    before = Watchdog(WatchdogConfig())
    for step in range(1, 31):
        before.look(step, {"actor/rep_loss": 1.0} | CALM)
    state = before.state_dict()
    assert len(alarms([9.0] * 5, state=state)) == 1
    assert alarms([9.0] * 5) == []


class Exploding(Trainer):
    """Its learning rate becomes absurd."""

    def _update(self, rollouts):
        if self.step == 7:
            for group in self.update.optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 0.5
            self.update.scheduler.base_lrs = [0.5]
        return super()._update(rollouts)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stop", "warn"])
def test_a_run_that_explodes(tmp_path, monkeypatch, capsys, action):
    monkeypatch.setattr("oprd.training.trainer.Trainer", Exploding)
    watch = LossWatch(action, factor=2, window=5, patience=2)
    cfg = small_run(tmp_path / "run", steps=12, eval__sets={}, watchdog__loss=watch)
    if action == "stop":
        with pytest.raises(TrainingStopped, match=r"actor/rep_loss has exploded.*step_\d+"):
            train(cfg)
        last = steps_of(tmp_path / "run")[-1]["step"]
        assert last < 12
        (checkpoint, *_), _torn = locate(tmp_path / "run")
        assert checkpoint.step == last
    else:
        assert train(cfg).steps == 12
        assert "warning: step" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["oprd", "opd_top1", "opd_topk_advantage"])
def test_a_healthy_run_raises_no_alarm(tmp_path, capsys, objective):
    """With limits much narrower than the default ones."""
    loss = LossWatch(factor=5, window=8, patience=3)
    cfg = small_run(tmp_path / "run", steps=25, eval__sets={}, objectives={objective: 1.0})
    cfg.rollout.prompts_per_step, cfg.watchdog, cfg.opd.k = 32, WatchdogConfig(loss=loss), 4
    assert train(cfg).steps == 25
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("watchdog", "message"),
    [
        (WatchdogConfig(loss=LossWatch(factor=1)), "watchdog.loss.factor must be above 1"),
        (WatchdogConfig(loss=LossWatch(window=2)), "watchdog.loss.window must be at least 5"),
        (WatchdogConfig(length=LengthWatch(patience=0)), "watchdog.length.patience"),
        (WatchdogConfig(length=LengthWatch(truncated=0)), "watchdog.length.truncated"),
        (WatchdogConfig(timeout_s=0), "watchdog.timeout_s must be above 0 or null"),
    ],
)
def test_wrong_numbers(watchdog, message):
    with pytest.raises(ConfigError, match=message):
        check_values(replace(demo_config(), watchdog=watchdog))


def test_the_rank_that_has_not_moved_is_named():
    beats = [
        Beat(0, "a", 7, "student update", 40, 5, "all_reduce, c10d.py:1", True),
        Beat(1, "b", 7, "rollout", 45, 2, "sleep, x.py:3"),
        Beat(2, "a", 7, "student update", 41, 5, "all_reduce, c10d.py:1", True),
    ]
    assert describe(beats, 4, now=1845.0) == (
        "rank 1 (b) has been in 'rollout' of step 7 for 1,800 s (at sleep, x.py:3) while ranks 0, "
        "2 wait in 'student update' of step 7 (at all_reduce, c10d.py:1), nothing is known of "
        "rank(s) 3"
    )
    on_gpus = [replace(beat, waits=False) for beat in beats]  # they wait for their GPU
    assert describe(on_gpus, 3, now=1845.0).startswith("rank 1 (b)")


def run_script(tmp_path, text, *launcher):
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path / "run")],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("limit", "seconds"), [(600.0, 2400), (None, 30 * 24 * 3600)])
def test_collectives_outlast_the_watchdog(monkeypatch, limit, seconds):
    limits = limits_of_two_ranks(monkeypatch)
    distributed.init("cpu", timeout_s=limit)
    assert [found.total_seconds() for found in limits] == [seconds]


HANGS = """
import sys, time
import oprd.training.trainer
from oprd import distributed
from pathlib import Path
from tests.support.runs import limits_of_two_ranks
from tests.oprd.training.test_trainer import small_run

class Sleeping(oprd.training.trainer.Trainer):
    def _rollouts(self):
        if self.step == 1 and distributed.rank() == 1:
            with self.timer("rollout"):
                time.sleep(600)
        return super()._rollouts()

oprd.training.trainer.Trainer = Sleeping
oprd.training.trainer.train(small_run(Path(sys.argv[1]), eval__sets={}, watchdog__timeout_s=6.0))
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    ran = run_script(tmp_path, HANGS, *launcher, "--nproc-per-node=2")
    assert ran.returncode != 0
    assert re.search(r"exitcode\s*: 124", ran.stderr), ran.stderr
    said = [line for line in ran.stderr.splitlines() if line.startswith("oprd-train: hung:")]
    assert len(said) == 1
    assert re.search(
        r"rank 1 \(.+\) has been in 'rollout' of step 2 for \d+ s \(at _rollouts, script.py:\d+\) "
        r"while rank 0 waits in 'rollout' of step 2 \(at ",
        said[0],
    )
    assert len(steps_of(tmp_path / "run")) == 1
    hung = tmp_path / "run" / "hung"
    assert "in _rollouts" in (hung / "rank_1_stacks.txt").read_text()
    assert "torch/distributed" in (hung / "rank_0_stacks.txt").read_text()
    assert (hung / "message.txt").read_text().strip() in said[0]


ALONE = """
import sys, time
from pathlib import Path
from oprd.observability import hang_watchdog
directory = Path(sys.argv[1])
with hang_watchdog.watching(2.0, directory):
    for _ in range(40):  # twice the limit, but something moves
        time.sleep(0.1)
        hang_watchdog.beat("working", step=3)
    print("still here", flush=True)
    time.sleep(600)
"""


def test_slow_is_not_hung(tmp_path):
    ran = run_script(tmp_path, ALONE)
    assert ran.returncode == hang_watchdog.EXIT_CODE
    assert ran.stdout == "still here\n"
    assert "rank 0 (" in ran.stderr
    assert "has been in 'working' of step 3 " in ran.stderr


STUCK = """
import ctypes, sys, time
from pathlib import Path
from oprd.observability import hang_watchdog
with hang_watchdog.watching(1.0, Path(sys.argv[1])):
    time.sleep(0.5)
    ctypes.PyDLL(None).sleep(600)  # called with the interpreter's lock held
"""


@pytest.mark.slow
def test_native_code_that_keeps_the_interpreters_lock(tmp_path):
    ran = run_script(tmp_path, STUCK)
    assert ran.returncode == 1
    assert "Timeout (0:00:02)!" in ran.stderr
    assert "script.py" in ran.stderr


@pytest.mark.slow
def test_a_hung_run_ends_where_nothing_can_be_written(tmp_path):
    (tmp_path / "run").write_text("no directory")
    ran = run_script(tmp_path, ALONE)
    assert ran.returncode == hang_watchdog.EXIT_CODE
    assert "has been in 'working' of step 3" in ran.stderr


@pytest.mark.slow
def test_a_run_beats_with_every_phase_and_token(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        hang_watchdog, "beat", lambda phase=None, step=None: seen.append((phase, step))
    )
    train(small_run(tmp_path / "run", steps=2))
    assert [step for _, step in seen if step] == [1, 2]
    assert {p for p, _ in seen if p} >= {"rollout", "after rollout", "teacher", "saving"}
    tokens = sum(s["response_length/max"] for s in steps_of(tmp_path / "run"))
    evaluations = sum("model" in line for line in lines(tmp_path / "run"))
    assert seen.count((None, None)) >= tokens + evaluations

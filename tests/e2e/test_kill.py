"""``kill -9`` at any moment, and the same command again."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file

from oprd.cli import train as cli
from tests.support.runs import assert_same, checkpoint_tensors, measured

pytestmark = pytest.mark.slow

STEPS, KILLS = 20, 7


def command(directory, staleness):
    return [
        *(f"--output_dir={directory}", "--resume=auto", f"--steps={STEPS}", "--log_every=1"),
        *("--rollout.prompts_per_step=4", "--checkpoint.every=2", "--eval.teacher=false"),
        f"--rollout.staleness={staleness}",
        "--eval.sets={val: {path: demo:val.jsonl, limit: 20, every: 6}}",
    ]


def train_on_a_slow_disk(arguments):
    """Writes take long enough to be met."""
    sync = os.fsync

    def slow(descriptor):
        time.sleep(0.01)
        sync(descriptor)

    os.fsync = slow
    cli.main(arguments)


def wait_for_unfinished(process, checkpoints, number):
    """Until a process has begun to write or delete so many checkpoints."""
    old = set(checkpoints.glob("*.tmp"))  # what the last kill left, until it is cleared away
    seen, deadline = set(), time.monotonic() + 60
    while process.is_alive() and len(seen) < number and time.monotonic() < deadline:
        now = set(checkpoints.glob("*.tmp"))
        old &= now
        seen |= now - old
        time.sleep(0.001)


def wait_for_lines(process, file, number):
    """Until a process has written so many lines, or is about to begin."""
    sizes, deadline = set(), time.monotonic() + 60
    while process.is_alive() and len(sizes) <= number and time.monotonic() < deadline:
        if file.exists():
            sizes.add(file.stat().st_size)
        time.sleep(0.001)


@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, staleness):
    # A server that has imported everything forks the runs: seconds saved on each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oprd.cli.train", "oprd.training.trainer"])

    def start(directory):
        process = context.Process(
            target=train_on_a_slow_disk, args=(command(directory, staleness),)
        )
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join(120)
    assert whole.exitcode == 0

    run, chance = tmp_path / "killed", random.Random(0)
    checkpoints = run / "checkpoints"
    in_writing = resumed = 0
    for kill in range(KILLS):
        resumed += bool(list(checkpoints.glob("step_????????")))
        process = start(run)
        if kill % 3:  # while something is being written or deleted
            wait_for_unfinished(process, checkpoints, chance.randint(1, 2))
            time.sleep(chance.uniform(0, 0.05))
        else:
            wait_for_lines(process, run / "metrics.jsonl", chance.randint(0, 4))
            time.sleep(chance.uniform(0, 0.2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        in_writing += bool(list(checkpoints.glob("*.tmp")))
    last = start(run)
    last.join(120)
    assert last.exitcode == 0
    assert in_writing >= 2, "no kills have met a write: the test has lost its point"
    assert resumed >= 4
    assert not list(checkpoints.glob("*.tmp"))

    student = "student/model.safetensors"
    assert_same(load_file(tmp_path / "whole" / student), load_file(run / student))
    final = f"checkpoints/step_{STEPS:08d}"
    tensors = checkpoint_tensors(run / final)
    assert any(name.startswith("optimizer/") for name in tensors)
    assert_same(checkpoint_tensors(tmp_path / "whole" / final), tensors)
    assert measured(run) == measured(tmp_path / "whole")

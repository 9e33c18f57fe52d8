"""Runs on two nodes: as on one, and what can go wrong between them."""

import re
import subprocess
import sys
import time

import pytest
import torch

from oprd.observability import hang_watchdog
from tests.oprd.distributed.test_fsdp import assert_agree
from tests.support.nodes import SECOND, possible, two_nodes
from tests.support.runs import ROOT, lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="network namespaces need root on Linux"),
]

CASES = ["oprd", "hybrid", "bfloat16"]


@pytest.fixture
def nodes(tmp_path):
    with two_nodes(tmp_path) as made:
        yield made


@pytest.mark.exhaustive
def test_four_ranks_of_two_nodes_agree_with_one(nodes, tmp_path):
    module = ["-m", "tests.support.on_ranks"]
    subprocess.run(
        [sys.executable, *module, str(tmp_path / "1"), *CASES], check=True, cwd=ROOT, timeout=300
    )
    said = nodes.torchrun(2, *module, str(tmp_path / "4"), *CASES)
    assert nodes.wait() == [0, 0], [file.read_text()[-2000:] for file in said]
    for case in CASES:
        one, four = (torch.load(tmp_path / ranks / f"{case}.pt") for ranks in "14")
        assert_agree(one, four, case)


IMPATIENT = """
import sys
from oprd import distributed
from oprd.cli import train as cli
from oprd.checkpoint.run import check_shared
check_shared.__defaults__ = (1.0,)  # seconds in which a shared file may appear
distributed.run_main(lambda: cli.main(sys.argv[1:]))
"""


def test_a_directory_that_they_do_not_share_is_refused(nodes, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "script.py").write_text(IMPATIENT)
    script = [str(tmp_path / "script.py"), f"--output_dir={own / 'run'}"]
    said = nodes.torchrun(1, *script, private=own)
    assert nodes.wait() == [1, 1]
    for file in said:
        assert "is not the same for all ranks" in file.read_text()
    assert not (own / "run" / "metrics.jsonl").exists()


def test_a_cut_cable_ends_the_run_and_it_goes_on_afterwards(nodes, tmp_path):
    run = tmp_path / "run"
    arguments = [
        "-m", "oprd.cli.train", f"--output_dir={run}", "--steps=30", "--eval.sets={}",
        "--resume=auto", "--checkpoint.every=5", "--log_every=1",
    ]  # fmt: skip
    said = nodes.torchrun(1, *arguments, "--watchdog.timeout_s=10")
    while not list(run.glob("checkpoints/step_*/")):
        assert all(process.poll() is None for process in nodes.running)
        time.sleep(0.1)
    nodes.plug(SECOND, "down")
    first, second = nodes.running
    assert first.wait(120) == 1
    text = said[0].read_text()
    assert re.search(r"hung: rank [01] \(node[78]\) has been in ", text)
    assert re.search(rf"exitcode\s*: {hang_watchdog.EXIT_CODE}", text)
    # The second's rank has ended by itself; its torchrun waits for the first's until TCP gives up.
    assert ended(said[1], 120)
    second.kill()
    nodes.running.clear()
    nodes.plug(SECOND, "up")
    said = nodes.torchrun(1, *arguments)
    assert nodes.wait() == [0, 0], [file.read_text()[-2000:] for file in said]
    steps = [line["step"] for line in lines(run) if "actor/grad_norm" in line]
    assert steps == [*range(1, 31)]


def ended(log, patience_s):
    """Whether a rank's watch has ended it: it could ask nobody."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if "Timeout (0:00:20)!" in log.read_text():
            return True
        time.sleep(0.2)
    return False

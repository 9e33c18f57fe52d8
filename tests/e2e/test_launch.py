"""The launch scripts, with stand-ins for Slurm and torchrun on the path."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "recipes" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.slurm"))

# Writes down how it was called; ends on SIGTERM as a run that is told to, with 1.
TORCHRUN = """#!/usr/bin/env bash
if [[ $1 == --help ]]; then echo "  --shutdown-timeout"; exit; fi
printf '%s\\n' "$@" > "$RECORD/torchrun"
if [[ $ENDS == itself ]]; then exit 0; fi
trap 'echo told > "$RECORD/told"; exit 1' TERM
for _ in {1..200}; do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$@" > "$RECORD/scontrol"; fi
"""
SRUN = """#!/usr/bin/env bash
shift
echo $$ > "$RECORD/srun_pid"
exec "$@"
"""
SCANCEL = """#!/usr/bin/env bash
[[ $1 == --signal=TERM && $2 == 42123.0 ]] && kill -TERM "$(cat "$RECORD/srun_pid")"
"""


def start(tmp_path, script, ends):
    commands = {"torchrun": TORCHRUN, "scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RECORD": str(tmp_path), "ENDS": ends,
        "SLURM_JOB_ID": "42123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    environment.pop("OPRD_VENV", None)
    arguments = ["recipe.yaml", "runs/x", "--optim.lr", "1e-6"]
    return subprocess.Popen(["bash", str(script), *arguments], env=environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_a_run_that_ends_by_itself(tmp_path, script):
    assert start(tmp_path, script, "itself").wait(timeout=30) == 0
    called = (tmp_path / "torchrun").read_text().split()
    at = called.index("-m")
    assert called[at:] == [
        *("-m", "oprd.cli.train", "--config", "recipe.yaml", "--output_dir", "runs/x"),
        *("--resume", "auto", "--optim.lr", "1e-6"),
    ]
    options = dict(zip(called[:at:2], called[1:at:2], strict=True))
    nodes = {"one_node": ("1", "localhost:0"), "two_nodes": ("2", "node7:22123")}[script.stem]
    assert (options["--nnodes"], options["--rdzv-endpoint"]) == nodes
    assert options["--nproc-per-node"] == "4"
    assert options["--rdzv-backend"] == "c10d"
    assert options["--shutdown-timeout"] == "280"
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_the_end_of_the_job_is_passed_on_and_the_job_is_queued_again(tmp_path, script):
    process = start(tmp_path, script, "when told")
    while not (tmp_path / "torchrun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # for the traps, which are set after that
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    assert (tmp_path / "told").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 42123\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "-s", "bash", str(script)], check=True)

"""benchmarks/on_gpu.sh: its parts on the CPU or with stand-ins, and what it writes."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import dram, gpu_outcomes, gpu_report, gpu_table, on_gpu
from benchmarks.gpu_cases import GpuCase
from benchmarks.parts import Part, PartSkipped, run_stages
from oprd_kernels import BackendUnavailable, doctor
from tests.kernels import test_gpu

ROOT = Path(__file__).parents[2]

FAKE_SANITIZER = """#!/bin/sh
while [ "$1" != python ]; do [ "$1" = --tool ] && echo "tool $2"; shift
case "$1" in */python*) break;; esac; done
exec "$@"
"""
FAKE_NCU = """#!{python}
import json, sys
json.dump([{{"what": "identity forward", "floor_bytes": 1000}}], open(sys.argv[-1], "w"))
print("==PROF== Connected")
print('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
print('"0","spin_kernel(long)","dram__bytes_read.sum","byte","7"')
print('"1","identity_forward","dram__bytes_read.sum","byte","1,001"')
print('"1","identity_forward","dram__bytes_write.sum","byte","9"')
"""


@pytest.fixture(autouse=True)
def no_options_of_this_run(monkeypatch):
    """The tests that on_gpu starts are not to take this run's options, nor themselves for its
    workers."""
    for name in ("ADDOPTS", "XDIST_WORKER", "XDIST_WORKER_COUNT", "XDIST_TESTRUNUID"):
        monkeypatch.delenv(f"PYTEST_{name}", raising=False)


def run_script(out, *options, bin=None, **environment):
    path = os.environ["PATH"] if bin is None else f"{bin}{os.pathsep}{os.environ['PATH']}"
    own = {"OMP_NUM_THREADS": "1", "OPRD_WHEELS": str(out.parent / "no_wheels")}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks/on_gpu.sh"), str(out), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path} | own | environment,
        cwd=out.parent,
    )


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.slow
def test_smoke(tmp_path):
    """The script itself, its parts at sizes for a CPU, the profilers played by stand-ins."""
    tools = tmp_path / "bin"
    tools.mkdir()
    executable(tools / "compute-sanitizer", FAKE_SANITIZER)
    executable(tools / "ncu", FAKE_NCU.format(python=sys.executable))
    parts = "build,doctor,table,opd,sanitizer,ncu,engines"
    done = run_script(tmp_path / "out", "--only", parts, bin=tools, OPRD_ON_GPU_DRY="1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [(p["part"], p["status"]) for p in results["parts"]] == [
        (part, "ok") for part in parts.split(",")
    ]
    assert results["table"]["rows"]
    assert results["tested_on"] is None
    text = (tmp_path / "out/results.md").read_text()
    assert "| identity, in place | 48 | 16 | bf16 |" in text
    assert "| empty autograd.Function |" in text
    assert "| full_forward | materialised |" in text
    assert "| identity forward | 0.0 | 0.0 | 0.0 | 1.010 | identity_forward |" in text
    checks = (tmp_path / "out/checks.log").read_text()
    assert {"tool memcheck", "tool racecheck"} <= set(checks.splitlines())
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_without_a_gpu_it_says_so(tmp_path):
    done = run_script(tmp_path / "out", CUDA_VISIBLE_DEVICES="", OPRD_ON_GPU_DRY="")
    assert done.returncode != 0
    assert "torch sees no GPU here" in done.stderr


def test_unknown_parts_and_a_missing_directory_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.main([])
    assert "OUT, a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        on_gpu.main([str(tmp_path), "--only", "doctor,tables"])
    assert "no part tables; there are build, doctor, table, tests" in capsys.readouterr().err


def test_wheels_are_listed_with_the_command_that_brings_them(capsys):
    assert on_gpu.main(["--wheels"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^jsonargparse +\d\S* here +to bring$", printed, re.MULTILINE)
    assert re.search(r"^execnet .* in the H200's image$", printed, re.MULTILINE)
    (command,) = (line for line in printed.splitlines() if "pip download --no-deps" in line)
    assert " jsonargparse " in command
    assert " execnet " not in command


def needed_by(*packages):
    """They and all that they require, as far as it is installed here."""
    found, left = set(), [canonicalize_name(name) for name in packages]
    while left:
        if (name := left.pop()) in found:
            continue
        found.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            for requirement in map(Requirement, metadata.requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate(
                    {"extra": "", "python_version": "3.12", "python_full_version": "3.12.3"}
                ):
                    left.append(canonicalize_name(requirement.name))
    return found


def test_wheels_are_complete_without_pip_looking_for_more():
    names = on_gpu.WHEELS + on_gpu.IN_THE_IMAGE
    missing = needed_by(*names) - set(names) - needed_by("torch", "transformers", "numpy")
    assert not missing


def part(name, tmp_path, *command, limit=60.0):
    return Part(name, limit, tmp_path / f"{name}.log", lambda running: running.run(*command)[-20:])


def outcomes_of(stages, budget=60.0):
    found = []
    run_stages(stages, budget, found.append)
    return {outcome.part: outcome for outcome in found}


def test_a_part_that_fails_or_hangs_loses_nobody_elses_result(tmp_path):
    marker = tmp_path / "survived"
    hangs = f"(sleep 3; touch {marker}) & sleep 60"

    def absent(_running):
        raise PartSkipped("no such tool")

    stages = [
        [part("fails", tmp_path, "sh", "-c", "echo before; echo the reason >&2; exit 3")],
        [part("hangs", tmp_path, "sh", "-c", hangs, limit=1.5), part("beside", tmp_path, "echo")],
        [Part("absent", 60, tmp_path / "absent.log", absent)],
        [part("missing", tmp_path, "/no/such/program")],
        [part("last", tmp_path, "echo", "still here")],
    ]
    start = time.monotonic()
    found = outcomes_of(stages)
    assert time.monotonic() - start < 30
    assert {name: o.status for name, o in found.items()} == {
        "fails": "failed",
        "hangs": "timed out",
        "beside": "ok",
        "absent": "skipped",
        "missing": "failed",
        "last": "ok",
    }
    assert found["fails"].note == "exit code 3: the reason"
    assert found["hangs"].note == "ended after 2 s"
    assert "ended at its time limit" in (tmp_path / "hangs.log").read_text()
    assert "still here" in found["last"].note
    time.sleep(max(0.0, start + 5 - time.monotonic()))
    assert not marker.exists(), "what a part had started outlived it"


def test_parts_beyond_the_budget_are_left_out(tmp_path):
    stages = [[part("long", tmp_path, "sleep", "60")], [part("next", tmp_path, "echo")]]
    found = outcomes_of(stages, budget=1.5)
    assert found["long"].status == "timed out"
    assert (found["next"].status, found["next"].note) == ("skipped", "no time was left")


@pytest.fixture
def check(tmp_path, monkeypatch):
    facts = {
        "gpu": "NVIDIA H200",
        "capability": "9.0",
        "torch": "2.11.0+cu130",
        "triton": "3.6.0",
        "commit": "abc1234",
        "date": "2026-11-28",
    }
    monkeypatch.setattr(on_gpu, "machine", lambda: dict(facts))
    return on_gpu.Check(tmp_path)


GOOD = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(5))
def test_good(i):
    assert i != {bad}

@pytest.mark.gpu
def test_skipped():
    pytest.skip("no")
"""
HANGS = """
import time

@pytest.mark.gpu
def test_hangs():
    time.sleep(60)

@pytest.mark.gpu
def test_afterwards():
    pass
"""
AFTER = """
@pytest.mark.gpu
def test_left(request):
    request.addfinalizer(lambda: 1 / 0)
"""


def run_tests(check, monkeypatch, tmp_path, text, limit=60, workers=False):
    """The tests part on a file of its own in place of `on_gpu.TESTS`."""
    (tmp_path / "test_it.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    original = on_gpu.Running.run

    def run(self, *command, env=None):
        assert env["OMP_NUM_THREADS"] == "1"
        command = ["2" if word == "auto" else word for word in command]
        return original(self, *command, env=env)

    monkeypatch.setattr(on_gpu.Running, "run", run)
    monkeypatch.setattr(on_gpu, "TESTS", (str(tmp_path / "test_it.py"),))
    check.dry = not workers
    (stage,) = (s for s in check.stages() if s[0].name == "tests")
    run_stages([stage], limit, check.done)
    (outcome,) = check.results["parts"]
    return outcome["status"], outcome["note"]


@pytest.mark.parametrize("workers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_failing_tests_are_counted_and_recorded(check, monkeypatch, tmp_path, workers):
    text = GOOD.format(bad=3) + AFTER
    ended = run_tests(check, monkeypatch, tmp_path, text, workers=workers)
    assert ended == ("failed", "4 passed, 2 failed, 1 skipped")
    results = json.loads((check.out / "results.json").read_text())
    assert results["tested_on"]["tests"] == {"passed": 4, "failed": 2, "skipped": 1}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True])
def test_tests_ended_at_the_time_limit_are_counted(check, monkeypatch, tmp_path, workers):
    text = GOOD.format(bad=9) + HANGS
    status, note = run_tests(check, monkeypatch, tmp_path, text, 15, workers)
    assert status == "timed out"
    # A worker that has nothing left to do may have taken the last test over.
    counts = "5 passed, 0 failed, 1 skipped, 2 not run", "6 passed, 0 failed, 1 skipped, 1 not run"
    assert note in [f"ended after 15 s: {c}" for c in counts]


def test_pytests_own_errors_are_told(check, monkeypatch, tmp_path):
    status, note = run_tests(check, monkeypatch, tmp_path, "import nothing_of_that_name")
    assert status == "failed"
    assert note.startswith("0 passed, 1 failed, 0 skipped; exit code 2: ")
    check.results["parts"].clear()
    check.results.pop("tests")
    (check.work / "outcomes.txt").unlink()
    status, note = run_tests(check, monkeypatch, tmp_path, "")
    assert status == "failed"
    assert note.startswith("no test has ended; exit code 5: no tests ran")


def test_what_the_tests_need_is_named(check, monkeypatch):
    there = on_gpu.find_spec
    lacks = ("execnet", "transformers")
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None if name in lacks else there(name))
    check.dry = False
    with pytest.raises(PartSkipped, match="needs transformers, execnet: see --wheels"):
        check.tests(None)
    check.dry = True  # without xdist
    with pytest.raises(PartSkipped, match="needs transformers: see --wheels"):
        check.tests(None)


def test_a_test_counts_once_by_its_worst_outcome(tmp_path):
    file = tmp_path / "outcomes"
    assert gpu_outcomes.count(file) == {}
    file.write_text("collected 4\ncollected 4\n")
    assert gpu_outcomes.count(file) == {}
    file.write_text("collected 4\npassed a b\nfailed a b\npassed c\nskipped d\n")
    assert gpu_outcomes.count(file) == {"passed": 1, "failed": 1, "skipped": 1, "not run": 1}


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb_hbm3"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm4_80gb"),
        ("AMD Instinct MI300X", "amd_instinct_mi300x"),
    ],
)
def test_result_files_are_named_after_the_gpu(gpu, name):
    assert on_gpu.slug(gpu) == name


def test_partial_results_are_adopted_and_what_is_missing_is_said(check, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "benchmarks/results").mkdir(parents=True)
    (root / "oprd_kernels").mkdir()
    check.results["demo"] = {"gsm8k": 0.5}
    for name, status in (("tests", "timed out"), ("demo", "ok"), ("ncu", "skipped")):
        check.done(on_gpu.Outcome(name, status, 1.0, "why"))
    on_gpu.adopt(tmp_path, None, root)
    assert (root / "benchmarks/results/h200.md").exists()
    assert not (root / "oprd_kernels/tested_on.json").exists()
    printed = capsys.readouterr().out
    assert "not to its end: tests: timed out why\n" in printed
    assert "not to its end: ncu: skipped why\n" in printed
    assert "not to its end: table: left out\n" in printed
    assert "demo:" not in printed
    check.results["tests"] = {"passed": 6, "failed": 0, "skipped": 2, "not run": 3}
    on_gpu.write(check.results, tmp_path / "results")
    on_gpu.adopt(tmp_path, None, root)
    (record,) = json.loads((root / "oprd_kernels/tested_on.json").read_text())
    assert record["tests"]["not run"] == 3


def test_adopted_results_are_what_the_doctor_tells(check, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "TESTED_ON", tmp_path / "root/oprd_kernels/tested_on.json")
    assert doctor.tested([]) == ["tested on no GPU: nothing is on record"]
    root = tmp_path / "root"
    (root / "benchmarks/results").mkdir(parents=True)
    (root / "oprd_kernels").mkdir()
    on_gpu.write(check.results, tmp_path / "results")
    with pytest.raises(SystemExit, match="no part of it has any results"):
        on_gpu.adopt(tmp_path, None, root)
    check.results["tests"] = {"passed": 6, "failed": 0, "skipped": 2}
    on_gpu.write(check.results, tmp_path / "results")
    for _ in range(2):
        on_gpu.adopt(tmp_path, "def5678", root)
    assert "commit def5678" in (root / "benchmarks/results/h200.md").read_text()
    assert doctor.tested(["NVIDIA H200", "NVIDIA A100"]) == [
        "tested on NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, commit def5678, 2026-11-28: "
        "6 passed, 0 failed, 2 skipped",
        "not tested on NVIDIA A100: nothing is on record",
    ]


def test_ncu_without_a_table_is_an_error():
    with pytest.raises(ValueError, match="printed no table: ==ERROR== no permission"):
        dram.sections([{"what": "a", "floor_bytes": 1}], "==ERROR== no permission\n")
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    with pytest.raises(ValueError, match="ncu saw 0 calls of 1"):
        dram.sections([{"what": "a", "floor_bytes": 1}], head)


def test_a_variant_that_fails_is_a_line_and_not_the_end():
    def refuse():
        raise BackendUnavailable("rank too large")

    def break_():
        raise ZeroDivisionError("oops")

    def make():
        variants = {"cpu": lambda: 1, "eager": break_, "compile": refuse}
        return {name: gpu_table.Variant(call) for name, call in variants.items()}

    case = GpuCase("identity", "identity, x", 4, 8, "bf16", 10**6, 0, make)
    rates = gpu_table.Rates(1e12, {"bf16": 1e14})
    rows = {row.variant: row for row in gpu_table.measure_case(case, rates, 0.0)}
    assert rows["cpu"].device_us > 0
    assert rows["cpu"].floor_us == pytest.approx(1.0)
    assert rows["eager"].problem == "ZeroDivisionError: oops"
    assert rows["compile"].problem.startswith("BackendUnavailable")


def test_the_table_puts_backends_beside_peers():
    def row(variant, us, **others):
        found = gpu_table.Row("bridge", "Bridge r = 64, mean", 65536, 2048, "bf16", variant, 205.0,
                              "bytes", us, method="graph")  # fmt: skip
        return {**vars(found), **others}

    rows = [
        row("cuda", None, problem="BackendUnavailable: rank"),
        row("triton", 410.0, forward_us=150.0, host_us=80.0, extra_bytes=2**28),
        row("eager", 4100.0, method="queued"),
        row("compile", None, problem="OutOfMemoryError: no"),
    ]
    rates = {"copy": 4.26e12, "gemm": {"bf16": 7e14}}
    result = {"rows": rows, "rates": rates, "host": [], "left_out": ["some"], "stopped_by": "x"}
    lines = gpu_report.kernel_tables(result).splitlines()
    head = "| case | M | d | dtype | floor | cuda us | triton us | eager us | compile us "
    assert any(line.startswith(head) for line in lines)
    line = next(x for x in lines if x.startswith("| Bridge r = 64"))
    assert (
        "| 65,536 | 2048 | bf16 | 205 | - | 410 (0.50) | 4,100* (0.05) | failed | 150 | 80" in line
    )
    assert "256" in line
    assert "Left out for want of time: some." in lines
    assert "- failed: Bridge r = 64, mean, bf16, compile: OutOfMemoryError: no" in lines


def test_every_two_options_meet_in_the_gpu_tests():
    """What tests/kernels/test_gpu.py leaves out of the product of all options."""
    axes = (test_gpu.RANKS, test_gpu.DTYPES, test_gpu.KINDS, test_gpu.REDUCTIONS)
    for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2):
        met = {(option[i], option[j]) for option in test_gpu.OPTIONS}
        assert met == set(itertools.product(a, b))
    for i, j in itertools.combinations(range(4), 2):
        values = [{shape[k] for shape in test_gpu.SHAPES} for k in (i, j)]
        assert {(s[i], s[j]) for s in test_gpu.SHAPES} == set(itertools.product(*values))

"""Everything to be known of this checkout on a machine with a GPU and no network: one command.

    bash benchmarks/on_gpu.sh OUT [--only PART,..] [--budget SECONDS]
    bash benchmarks/on_gpu.sh --wheels
    bash benchmarks/on_gpu.sh --adopt OUT [--commit COMMIT]

Builds for this GPU, then doctor, table (the kernels' times), tests (``-m gpu``), gains
(`oprd-gains` at the paper's shape), opd (the chunked baselines beside Liger's), sanitizer
(compute-sanitizer) beside demo (`oprd-train`), ncu, overlap (what a teacher pass beside the
student's gains) and engines (sampling without vLLM). OUT receives results.json and results.md,
written anew after each part, and logs: eight files. OPRD_COMMIT in the environment names the commit
where git can't. ``--adopt`` puts the results of another machine into this checkout:
benchmarks/results/ and oprd_kernels/tested_on.json, which `oprd-doctor` reads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import gpu_outcomes
from benchmarks.parts import (
    Outcome,
    Part,
    PartFailed,
    PartSkipped,
    PartTimedOut,
    Running,
    end_all,
    run_stages,
)

ROOT = Path(__file__).parents[1]
BUDGET = 470.0
DRY = "OPRD_ON_GPU_DRY"
"""Set to 1: sizes for a CPU and nothing built, to test this script."""
MEASURED = ("table", "tests", "gains", "opd", "sanitizer", "demo", "ncu")
"""The parts that tell something about the kernels."""

TESTS = ("tests/kernels/test_gpu.py", "tests/oprd/distill/test_vocab_triton.py")

WHEELS = (
    "antlr4-python3-runtime",
    "datasets",
    "dill",
    "docstring-parser",
    "jsonargparse",
    "latex2sympy2-extended",
    "liger-kernel",
    "math-verify",
    "multiprocess",
    "py-cpuinfo2",
    "typeshed-client",
    "tzdata",
)
"""Pure Python, or small, and missing in the lent H200's image. Gains and demo need all but
liger-kernel, which the table compares with if it is there, and pytest-benchmark's py-cpuinfo2."""
IN_THE_IMAGE = (
    "cmake",
    "contourpy",
    "cycler",
    "execnet",
    "filelock",
    "fonttools",
    "hypothesis",
    "iniconfig",
    "kiwisolver",
    "markdown-it-py",
    "matplotlib",
    "mdurl",
    "ninja",
    "pandas",
    "pillow",
    "pluggy",
    "pyarrow",
    "pybind11",
    "pygments",
    "pyparsing",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "python-dateutil",
    "rich",
    "six",
    "sortedcontainers",
    "xxhash",
)
"""There already, and what else `WHEELS`, the build and the tests need, so that --no-deps will do,
beyond torch, transformers and theirs. Of these the build needs cmake and pybind11, the tests
pytest, filelock and, with pytest-xdist, execnet; gains and demo most of the others."""

PAPER = {
    "d": 1536,
    "layers": 28,
    "heads": 12,
    "kv_heads": 2,
    "intermediate": 8960,
    "vocab": 151936,
    "tied": "false",
    "batch": 2,
    "tokens": 8192,
    "dtype": "bfloat16",
    "gradient_checkpointing": "on",
    "rounds": 3,
    "objectives": "[backbone,oprd,bridge,opd_topk,opd_topk_chunked,opd_topk_set_chunked]",
}
"""Of `oprd-gains`: Qwen2's shape in the paper."""

PYTHON = sys.executable
ENTRY = "import sys; from {} import {} as main; main(sys.argv[1:])"


class Check:
    """One run: what its parts share."""

    def __init__(self, out: Path):
        self.out = out
        self.dry = os.environ.get(DRY) == "1"
        self.work = Path(tempfile.mkdtemp(prefix="oprd_on_gpu_"))
        self.results: dict[str, Any] = {"machine": machine(), "parts": []}

    def stages(self) -> list[list[Part]]:
        """All parts, in order; those of one stage run at the same time."""
        parts = {
            "build": (200, "build", self.build),
            "doctor": (40, "build", self.doctor),
            "table": (150, "table", self.table),
            "tests": (150, "tests", self.tests),
            "gains": (100, "gains", self.gains),
            "opd": (60, "gains", self.opd),
            "sanitizer": (120, "checks", self.sanitizer),
            "demo": (120, "demo", self.demo),
            "ncu": (60, "checks", self.ncu),
            "overlap": (60, "gains", self.overlap),
            "engines": (120, "gains", self.engines),
        }
        made = {
            name: Part(name, limit, self.out / f"{log}.log", work)
            for name, (limit, log, work) in parts.items()
        }
        order = [["build"], ["doctor"], ["table"], ["tests"], ["gains"], ["opd"]]
        order += [["sanitizer", "demo"], ["ncu"], ["overlap"], ["engines"]]
        return [[made[name] for name in stage] for stage in order]

    def build(self, running: Running) -> str:
        if self.dry:
            return "dry: nothing is built"
        own = self.results["machine"]["capability"].replace(".", "")
        wanted = os.environ.get("OPRD_CUDA_ARCHITECTURES") or own
        env = {"OPRD_REQUIRE_NATIVE": "1", "OPRD_CUDA_ARCHITECTURES": wanted}
        running.run(PYTHON, "setup.py", "-q", "egg_info", "build_ext", "--inplace", env=env)
        report = json.loads((ROOT / "oprd_kernels/_build_report.json").read_text())
        if report["cuda"]:
            raise PartFailed(f"without CUDA: {report['cuda']}")
        return f"for architecture {wanted}"

    def doctor(self, running: Running) -> str:
        printed = running.run(PYTHON, "-m", "oprd_kernels.doctor")
        live = [line.split()[0] for line in printed.splitlines() if " live: " in line]
        return f"live: {', '.join(live)}"

    def table(self, running: Running) -> str:
        file = self.work / "table.json"
        options = ["--tiny"] if self.dry else []
        seconds = f"{max(running.left - 15, 5):.0f}"
        try:
            # Without a pool of compiling processes for each of the processes that compile ahead.
            running.run(
                *(PYTHON, "-m", "benchmarks.gpu_table", file, "--seconds", seconds, *options),
                env={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
        finally:
            if file.exists():
                self.results["table"] = json.loads(file.read_text())
        left_out = len(self.results["table"]["left_out"])
        return f"{len(self.results['table']['rows'])} measurements, {left_out} cases left out"

    def tests(self, running: Running) -> str:
        # tests/conftest.py imports oprd, and that transformers.
        needed = ["pytest", "filelock", "transformers"]
        if workers := find_spec("xdist") is not None and not self.dry:
            needed.append("execnet")
        if missing := lacking(*needed):
            raise PartSkipped(missing)
        outcomes = self.work / "outcomes.txt"
        command = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
        command += ["-p", "no:cacheprovider", "--durations", "15"]
        command += ["-p", gpu_outcomes.__name__]
        if workers:
            command += ["-n", "auto", "--dist", "worksteal"]
        # A thread each: the float64 oracles of all workers would share the cores.
        env = {"OMP_NUM_THREADS": "1", gpu_outcomes.VARIABLE: str(outcomes)}
        try:
            running.run(*command, env=env)
        except PartFailed as error:
            # 1: tests failed. Otherwise it was pytest itself, or what it could not collect.
            reason = "" if str(error).startswith("exit code 1:") else f"; {error}"
            raise PartFailed(self._counted(outcomes) + reason) from None
        except PartTimedOut:
            raise PartTimedOut(self._counted(outcomes)) from None
        return self._counted(outcomes)

    def _counted(self, outcomes: Path) -> str:
        """Keeps the tests that have ended, if any."""
        counts = gpu_outcomes.count(outcomes)
        if not counts:
            return "no test has ended"
        self.results["tests"] = counts
        return ", ".join(f"{count} {name}" for name, count in counts.items())

    def gains(self, running: Running) -> str:
        needs_training_packages()
        out = self.work / "gains"
        options = ["--dry_run"] if self.dry else ["--output_dir", str(out)]
        shape = [f"--{name}={value}" for name, value in PAPER.items()]
        running.run(PYTHON, "-c", ENTRY.format("oprd.cli.gains", "main"), *shape, *options)
        if self.dry:
            return "dry: the prediction only"
        self.results["gains"] = (out / "gains.md").read_text()
        rows = json.loads((out / "gains.json").read_text())["modes"]["on"]
        seconds = {row["objective"]: row["seconds"] for row in rows}
        return f"OPRD {seconds['oprd']:.3f} s an update, backbone alone {seconds['backbone']:.3f}"

    def opd(self, running: Running) -> str:
        needs_training_packages()
        out = self.work / "opd.json"
        tiny = ["--rows", "8", "--width", "16", "--vocab", "99", "--dtype", "fp32"]
        command = [PYTHON, "-m", "benchmarks.vocab_losses", str(out)]
        running.run(*command, *(tiny if self.dry else []))
        self.results["opd"] = json.loads(out.read_text())
        ways = {row["way"] for row in self.results["opd"]["rows"]}
        return ", ".join(sorted(ways))

    def overlap(self, running: Running) -> str:
        needs_training_packages()
        found = {}
        for tokens in (128,) if self.dry else (16384, 2048):  # products that fill it, and launches
            file = self.work / f"overlap_{tokens}.json"
            running.run(
                PYTHON, "-m", "benchmarks.overlap", "--tokens", str(tokens), "--output", file,
                *(["--device", "cpu", "--rounds", "1"] if self.dry else []),
            )  # fmt: skip
            found[tokens] = json.loads(file.read_text())
        self.results["overlap"] = found
        return "in turn / ahead: " + ", ".join(
            f"{f['gain']:.3f} at {tokens} tokens{'' if f['equal'] else ', NOT EQUAL'}"
            for tokens, f in found.items()
        )

    def engines(self, running: Running) -> str:
        needs_training_packages()
        out = self.work / "engines.json"
        running.run(
            PYTHON, "-m", "benchmarks.rollout_engines", "--rounds", "1", "--no-generate_batch",
            "--json", out, *(["--small", "--device", "cpu"] if self.dry else []),
        )  # fmt: skip
        self.results["engines"] = json.loads(out.read_text())
        rates = {row["engine"]: row["tokens_per_s"] for row in self.results["engines"]["rows"]}
        return "tokens/s: " + "; ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())

    def demo(self, running: Running) -> str:
        needs_training_packages()
        out = self.work / "demo"
        options = ["--dry_run"] if self.dry else ["--output_dir", str(out)]
        env = {"HF_HUB_OFFLINE": "1"}
        command = [
            PYTHON,
            "-c",
            ENTRY.format("oprd.cli.train", "main"),
            "--steps",
            "100",
            *options,
        ]
        running.run(*command, env=env)
        if self.dry:
            return "dry: the configuration only"
        scores = json.loads((out / "summary.json").read_text())["evaluations"]
        after = {name: round(r["avg"], 4) for name, r in scores["student after"].items()}
        self.results["demo"] = after
        return "accuracy " + ", ".join(f"{name} {value}" for name, value in after.items())

    def sanitizer(self, running: Running) -> str:
        def calls(parts: int) -> list[list[str]]:
            command = [PYTHON, "-m", "benchmarks.sanitize"]
            return [[*command, f"{part}/{parts}"] for part in range(parts)]

        running.run_all(calls(2 if self.dry else 8))  # compiles: what follows finds the kernels
        tool = find_tool("compute-sanitizer")
        options = ["--error-exitcode", "9", "--target-processes", "application-only", "--tool"]
        # PyTorch and Triton ask questions whose answer is an error.
        kinds = (["memcheck", "--report-api-errors", "no"], ["racecheck"])
        watched = [[tool, *options, *kind, *call] for kind in kinds for call in calls(2)]
        running.run_all(watched, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        return "memcheck and racecheck found nothing"

    def ncu(self, running: Running) -> str:
        from benchmarks import dram

        tool, names = find_tool("ncu"), self.work / "calls.json"
        options = ["--metrics", ",".join(dram.METRICS), "--clock-control", "none", "--csv"]
        options += ["--print-units", "base", "--profile-from-start", "off"]
        options += ["--target-processes", "application-only"]
        printed = running.run(tool, *options, PYTHON, "-m", "benchmarks.dram", names)
        self.results["ncu"] = dram.sections(json.loads(names.read_text()), printed)
        return f"{len(self.results['ncu'])} calls"

    def done(self, outcome: Outcome) -> None:
        """Tell, and keep what there is so far."""
        print(f"{outcome.part:<10} {outcome.status:<10} {outcome.seconds:4.0f} s  {outcome.note}",
              flush=True)  # fmt: skip
        self.results["parts"].append(asdict(outcome))
        self.results["tested_on"] = tested_on(self.results)
        write(self.results, self.out / "results")


def lacking(*modules: str) -> str | None:
    """A line for those that can't be imported, or None."""
    missing = [module for module in modules if find_spec(module) is None]
    return f"needs {', '.join(missing)}: see --wheels" if missing else None


def needs_training_packages() -> None:
    """Raises:
    PartSkipped: where `oprd` can't be imported.
    """
    needed = ("transformers", "jsonargparse", "datasets", "math_verify", "rich", "matplotlib")
    if missing := lacking(*needed):
        raise PartSkipped(missing)


def find_tool(name: str) -> str:
    """Its path.

    Raises:
        PartSkipped: if it is not here.
    """
    folders = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
    places = [f"{folder}/{name}" for folder in (*folders, "/opt/nvidia/nsight-compute/*")]
    found = shutil.which(name) or next((p for place in places for p in sorted(glob(place))), None)
    if found is None:
        raise PartSkipped(f"{name} is not on PATH")
    return found


def machine() -> dict[str, Any]:
    """GPU, driver, versions and commit; by a process of its own, so that this one, which waits for
    the profiler's, keeps the GPU free."""
    script = "import json; from benchmarks.machine import describe_gpu as d; print(json.dumps(d()))"
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"torch can't be imported here:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {
        "commit": os.environ.get("OPRD_COMMIT") or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """What is checked out, or that git doesn't say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def tested_on(results: dict[str, Any]) -> dict[str, Any] | None:
    """The record for `oprd-doctor`, once a test has run on a GPU."""
    facts = results["machine"]
    if "tests" not in results or "gpu" not in facts:
        return None
    kept = ("gpu", "torch", "triton", "commit", "date")
    notes = {p["part"]: p["note"] for p in results["parts"] if p["status"] == "ok"}
    record = {name: facts[name] for name in kept} | {"tests": results["tests"]}
    return record | ({"sanitizer": notes["sanitizer"]} if "sanitizer" in notes else {})


def write(results: dict[str, Any], stem: Path) -> None:
    """``stem``.json and .md; the report imports torch, so only now."""
    from benchmarks.gpu_report import document

    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(document(results))


def slug(gpu: str) -> str:
    """A GPU's name as one of a file: "NVIDIA H100 80GB HBM3" as "h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower().replace("nvidia", "")).strip("_")


def adopt(out: Path, at_commit: str | None, root: Path = ROOT) -> None:
    """Copy another machine's results into this checkout, under the GPU's name, and say which parts
    did not run to their end.

    Raises:
        SystemExit: if they are of no GPU, or no part has any.
    """
    results = json.loads((out / "results.json").read_text())
    if at_commit:
        results["machine"]["commit"] = at_commit
    gpu = results["machine"].get("gpu")
    ended = {p["part"]: p for p in results["parts"]}
    ok = [name for name in MEASURED if ended.get(name, {}).get("status") == "ok"]
    if gpu is None or not (ok or any(name in results for name in MEASURED)):
        raise SystemExit(f"{out}/results.json has no GPU, or no part of it has any results")
    for name in MEASURED:
        if name not in ok:
            part = ended.get(name, {"status": "left out", "note": ""})
            print(f"not to its end: {name}: {part['status']} {part['note']}".rstrip())
    name = slug(gpu)
    record = tested_on(results)
    write(results | {"tested_on": record}, root / "benchmarks/results" / name)
    written = f"benchmarks/results/{name}.md and {name}.json"
    if record is not None:
        file = root / "oprd_kernels/tested_on.json"
        records = json.loads(file.read_text()) if file.exists() else []
        kept = [one for one in records if one["gpu"] != gpu]
        file.write_text(json.dumps([*kept, record], indent=1) + "\n")
        written += " and oprd_kernels/tested_on.json"
    print(f"written: {written}")


def print_wheels() -> None:
    """What a machine without network may lack, and how to bring it."""
    for name in sorted(WHEELS + IN_THE_IMAGE):
        try:
            here = f"{version(name)} here"
        except PackageNotFoundError:
            here = "missing here"
        there = "in the H200's image" if name in IN_THE_IMAGE else "to bring"
        print(f"{name:<24} {here:<18} {there}")
    print(
        "\nWhere there is a network, for the other machine's Python (3.12, say), in the checkout:\n"
        "  python -m pip download --no-deps --only-binary=:all: --python-version 3.12 "
        f"--implementation cp --platform manylinux_2_28_x86_64 -d .whl {' '.join(WHEELS)}\n"
        "Leave out what is there; for another image, add what it lacks of the others. They are "
        "complete beside torch and transformers. on_gpu.sh installs what is in .whl, or in the "
        "folder that OPRD_WHEELS names, beside the machine's own packages."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if a part failed or timed out."""
    parser = argparse.ArgumentParser(prog="on_gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="a directory for results and logs")
    parser.add_argument("--only", metavar="PART[,PART]", help="leave the other parts out")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--wheels", action="store_true", help="print what to bring; run nothing")
    parser.add_argument("--adopt", action="store_true", help="take over OUT's results")
    parser.add_argument("--commit", help="with --adopt: what was checked out there")
    given = parser.parse_args(argv)
    if given.wheels:
        print_wheels()
        return 0
    if given.out is None:
        parser.error("OUT, a directory for results and logs, is missing")
    if given.adopt:
        adopt(given.out, given.commit)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    check = Check(given.out.resolve())
    stages = check.stages()
    if given.only:
        wanted = given.only.split(",")
        known = [part.name for stage in stages for part in stage]
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
        stages = [[part for part in stage if part.name in wanted] for stage in stages]
    if "gpu" not in check.results["machine"] and not check.dry:
        raise SystemExit("torch sees no GPU here")
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: end_all())
    try:
        run_stages([stage for stage in stages if stage], given.budget, check.done)
    finally:
        shutil.rmtree(check.work, ignore_errors=True)
    print(f"{check.out}/results.md")
    return int(any(p["status"] in ("failed", "timed out") for p in check.results["parts"]))


if __name__ == "__main__":
    sys.exit(main())

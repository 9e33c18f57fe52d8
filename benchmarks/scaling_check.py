"""What `oprd-scaling` predicts for 1, 2 and 3 gloo ranks on this machine, and what they take.

    python -m benchmarks.scaling_check [--ranks 1 2 3] [--steps 20] [--rounds 3] [--output FILE]

The demo is trained on one rank, with FSDP2's hooks but nothing to send. What that takes, the
machine's own links (a line through the seconds of all-gathers and reduce-scatters of several sizes,
for each number of ranks) and its number of cores give the prediction for the others. Gloo works on
the cores that the ranks compute on, so nothing is taken to overlap. On one rank the prediction is
what was measured.

Ranks also share caches and memory, which the number of cores does not tell. So a second prediction
takes, instead of it, how much longer a run takes while others like it run that it never talks to.
Bytes are counted too: every collective of FSDP2 in one step, against the plan.

Measure on an idle machine: what shares its cores is part of every number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console

from oprd import distributed
from oprd.atomic_files import write_json
from oprd.benchmark.scaling import Machine, Measured, Model, Predicted, Scaling, predict
from oprd.benchmark.scaling_inputs import read
from oprd.config.demo import demo_config
from oprd.distributed.device import num_cores
from oprd.observability.tables import TextTable, show

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 4 * 2**20)
"""Bytes of what is gathered; a block of the demo has 1 MiB."""
POSITION = {"output_tensor": 0, "input_tensor": 1}
"""Of the arguments of FSDP2's collectives."""
SCALINGS: tuple[Scaling, ...] = ("weak", "strong")
PROMPTS = 60
"""Prompts a step, which so many ranks share evenly."""


def launched(ranks: int, *arguments: str | Path) -> None:
    """Run this module, or another, on as many ranks."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    ended([started([*launcher, "-m", *map(str, arguments)])])


def started(arguments: list[str]) -> subprocess.Popen:
    """Start Python with these arguments."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def ended(processes: list[subprocess.Popen]) -> None:
    """Wait for processes; exit with the errors of the first that failed."""
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        if process.returncode:
            why = [x for x in error.splitlines() if "rror" in x] or [error]
            sys.exit(f"{' '.join(map(str, process.args))} failed:\n" + "\n".join(why[:20]))


# On the ranks -----------------------------------------------------------------------------------


def time_links(file: Path, rounds: int) -> None:
    """Write the median seconds of an all-gather and a reduce-scatter of each of `SIZES`."""
    distributed.init("cpu")
    ranks, found = distributed.world_size(), {}
    for size in SIZES:
        shard = torch.zeros(size // 4 // ranks)
        whole = torch.zeros(shard.numel() * ranks)
        seconds = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            dist.all_gather_into_tensor(whole, shard)
            dist.reduce_scatter_tensor(shard, whole)
            seconds.append((time.perf_counter() - start) / 2)
        found[whole.numel() * 4] = distributed.max_over_ranks(median(seconds), torch.device("cpu"))
    if distributed.rank() == 0:
        file.write_text(json.dumps(found))
    distributed.shutdown()


def count_bytes(file: Path) -> None:
    """Train one step and write the bytes that FSDP2's collectives of the update have sent."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    from oprd.training import trainer
    from oprd.training.trainer import Trainer

    sent = {"all-gather": 0, "reduce-scatter": 0}
    is_counted = False

    def count(cls: type, name: str, argument: str) -> None:
        own = cls.__call__

        def counting(self, *args, **kwargs):
            moved = kwargs[argument] if argument in kwargs else args[POSITION[argument]]
            sent[name] += is_counted * moved.nbytes
            return own(self, *args, **kwargs)

        cls.__call__ = counting  # type: ignore[operator]

    count(_fsdp_collectives.DefaultAllGather, "all-gather", "output_tensor")
    count(_fsdp_collectives.DefaultReduceScatter, "reduce-scatter", "input_tensor")
    update = Trainer._update

    def counted(self, rollouts):
        nonlocal is_counted
        is_counted = True
        try:
            return update(self, rollouts)
        finally:
            is_counted = False

    Trainer._update = counted  # type: ignore[method-assign]
    cfg = demo_config()
    cfg.output_dir, cfg.steps = str(file.parent / "counted"), 1
    cfg.eval.sets, cfg.eval.teacher, cfg.logging.diagnostics_every = {}, False, 0
    trainer.train(cfg)
    if int(os.environ["RANK"]) == 0:
        file.write_text(json.dumps(sent))


# Of this process --------------------------------------------------------------------------------


def links(directory: Path, ranks: int, rounds: int, cores: int) -> tuple[Machine, dict]:
    """Return what this machine's links are between so many ranks, and what was timed."""
    file = directory / f"links-{ranks}.json"
    launched(ranks, "benchmarks.scaling_check", "--time-links", file, "--rounds", str(rounds))
    timed = {int(size): seconds for size, seconds in json.loads(file.read_text()).items()}
    launch, per_byte = line(list(timed), list(timed.values()))
    rate = (ranks - 1) / ranks / per_byte
    return machine(ranks, cores, rate, launch), timed


def machine(ranks: int, cores: int, rate: float = 1.0, launch: float = 0.0) -> Machine:
    """Return a machine of one node whose ranks share cores."""
    return Machine(ranks, rate, rate, launch=launch, overlaps=False, cores=cores)


def line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Return start and slope of the line that is nearest to the points, by relative error."""
    a = torch.tensor([[1.0 / v, size / v] for size, v in zip(x, y, strict=True)]).double()
    start, slope = torch.linalg.lstsq(a, torch.ones(len(x), 1).double()).solution.flatten().tolist()
    return max(start, 0.0), max(slope, 1e-15)


def trained(directory: Path, ranks: int, scaling: Scaling, steps: int, again: int) -> Measured:
    """Train the demo and return what its steps took."""
    prompts = PROMPTS * (ranks if scaling == "weak" else 1)
    run = directory / f"{scaling}-{ranks}-{again}"
    launched(ranks, *demo(run, steps, prompts))
    return read(run, "", "").model.measured


def demo(run: Path, steps: int, prompts: int) -> list[str]:
    """Return the module and the options of a run."""
    options = {
        "output_dir": run, "steps": steps, "fsdp.mode": "always", "eval.sets": "{}",
        "eval.teacher": "false", "logging.diagnostics_every": 0,
        "rollout.prompts_per_step": prompts,
    }  # fmt: skip
    return ["oprd.cli.train", *(f"--{name}={value}" for name, value in options.items())]


def slowdown(directory: Path, ranks: int, steps: int, again: int, alone: Measured) -> float:
    """Return how much longer than ``alone`` a run takes beside others that it never talks to."""
    runs = [directory / f"beside-{ranks}-{again}-{i}" for i in range(ranks)]
    ended([started(["-m", *demo(run, steps, PROMPTS)]) for run in runs])
    seconds = [measured_seconds(read(run, "", "").model.measured) for run in runs]
    return median(seconds) / measured_seconds(alone)


def part_seconds(p: Predicted) -> float:
    """Return the seconds that are compared: of teacher, update and optimizer."""
    return p.teacher + p.update + p.waiting + (p.optimizer or 0.0)


def measured_seconds(m: Measured) -> float:
    """Return the same of a run."""
    return m.teacher + m.update + (m.optimizer or 0.0)


def check(ranks: list[int], steps: int, rounds: int, directory: Path) -> dict:
    """Measure, predict and return both."""
    cores = num_cores()
    timed, machines = {}, {1: machine(1, cores)}
    for n in (n for n in ranks if n > 1):
        machines[n], timed[n] = links(directory, n, 30, cores)
    seconds: dict[tuple[Scaling, int], list[float]] = {}
    slower: dict[int, list[float]] = {1: [1.0]}
    first: list[Measured] = []
    for again in range(rounds):  # in turns, so that what changes on the machine reaches all
        first.append(trained(directory, 1, "weak", steps, again))
        for scaling in SCALINGS:
            seconds.setdefault((scaling, 1), []).append(measured_seconds(first[-1]))
            for n in ranks[1:]:
                found = trained(directory, n, scaling, steps, again)
                seconds.setdefault((scaling, n), []).append(measured_seconds(found))
        for n in ranks[1:]:
            found_slower = slowdown(directory, n, steps, again, first[-1])
            slower.setdefault(n, []).append(found_slower)
    source = read(directory / "weak-1-0", "", "")
    middle = sorted(first, key=measured_seconds)[len(first) // 2]
    model = Model(middle, source.model.student, source.model.teacher)
    rows = []
    for scaling in SCALINGS:
        for n in ranks:
            times = max(1.0, median(slower[n]))
            own = replace(machines[n], cores=n / times)
            by_cores, by_own = (predict(model, m, n, scaling) for m in (machines[n], own))
            rows.append(
                {
                    "scaling": scaling,
                    "ranks": n,
                    "by cores": part_seconds(by_cores),
                    "slowdown": times,
                    "predicted": part_seconds(by_own),
                    "waiting": by_own.waiting,
                    "measured": median(seconds[scaling, n]),
                    "rounds": seconds[scaling, n],
                }
            )
    return {"cores": cores, "links": timed, "rows": rows, "bytes": bytes_of(directory, model)}


def bytes_of(directory: Path, model: Model) -> dict:
    """Return the bytes that two ranks' collectives move in a step, as planned and as counted."""
    file = directory / "bytes.json"
    launched(2, "benchmarks.scaling_check", "--count-bytes", file)
    counted, student, teacher = json.loads(file.read_text()), model.student, model.teacher
    gathers = student.blocks * student.block * (2 if student.again else 1) + student.root
    gathers += teacher.blocks * teacher.block + teacher.root
    scatters = student.blocks * student.block_gradients + student.root_gradients
    planned = {"all-gather": gathers, "reduce-scatter": scatters}
    return {name: {"planned": planned[name], "counted": counted[name]} for name in planned}


def tables(found: dict) -> list[TextTable]:
    """Make the tables of what `check` has found."""
    rows = [
        [
            row["scaling"],
            str(row["ranks"]),
            f"{row['by cores']:.3f}",
            f"{row['slowdown']:.2f}",
            f"{row['predicted']:.3f}",
            f"{row['waiting']:.3f}",
            f"{row['measured']:.3f}",
            f"{min(row['rounds']):.3f} to {max(row['rounds']):.3f}",
            f"{row['predicted'] / row['measured'] - 1:+.0%}",
        ]
        for row in found["rows"]
    ]
    heads = (
        "scaling", "ranks", "by\ncores s", "slow-\ndown", "predict-\ned s", "of it\nlinks s",
        "measured\ns", "rounds", "error",
    )  # fmt: skip
    notes = [
        f"Seconds of teacher, update and optimizer in a step of the demo, on {found['cores']} "
        "cores. The first row of each is measured, not predicted. By cores: the prediction that "
        "only knows their number. Slowdown: of runs beside each other that do not talk, which the "
        "prediction takes. Gloo's links, of an all-gather:"
    ]
    for ranks, timed in found["links"].items():
        shown = ", ".join(f"{s * 1e3:.2f} ms for {n / 1024:,.0f} KiB" for n, s in timed.items())
        notes.append(f"- {ranks} ranks: {shown}")
    bytes_ = [
        [name, f"{b['planned'] / 2**20:.3f}", f"{b['counted'] / 2**20:.3f}"]
        for name, b in found["bytes"].items()
    ]
    return [
        TextTable("predicted and measured", heads, rows, notes),
        TextTable("bytes of a step on 2 ranks", ("", "planned\nMiB", "counted\nMiB"), bytes_),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--time-links", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count-bytes", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time_links:
        time_links(options.time_links, options.rounds)
    elif options.count_bytes:
        count_bytes(options.count_bytes)
    else:
        ranks = sorted({1, *options.ranks})
        with tempfile.TemporaryDirectory() as directory:
            found = check(ranks, options.steps, options.rounds, Path(directory))
        show(Console(highlight=False), tables(found))
        if options.output:
            write_json(options.output, found)


if __name__ == "__main__":
    main()

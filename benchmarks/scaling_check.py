"""What `oprd-scaling` predicts for 1, 2 and 3 gloo ranks on this machine, and what they take.

    python -m benchmarks.scaling_check [--ranks 1 2 3] [--steps 20] [--rounds 3] [--output FILE]

The demo is trained on one rank, with FSDP2's hooks but nothing to send. What that takes, the
machine's own links (a line through the seconds of all-gathers and reduce-scatters of several sizes,
for each number of ranks) and its number of cores give the prediction for the others. Gloo works on
the cores that the ranks compute on, so nothing is taken to overlap. On one rank the prediction is
what was measured. Bytes are counted too: every collective of FSDP2 in one step, against the plan.

Measure on an idle machine: what shares its cores is part of every number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
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
from oprd.observability.tables import TextTable, show

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 4 * 2**20)
"""Bytes of what is gathered; a block of the demo has 1 MiB."""
PROMPTS = 64


def launched(ranks: int, *arguments: str | Path) -> None:
    """Run this module, or another, on as many ranks."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *launcher, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


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
            start = torch.tensor(-_now(), dtype=torch.float64)
            dist.all_gather_into_tensor(whole, shard)
            dist.reduce_scatter_tensor(shard, whole)
            seconds.append((start + _now()).item() / 2)
        found[whole.numel() * 4] = distributed.max_over_ranks(median(seconds), torch.device("cpu"))
    if distributed.rank() == 0:
        file.write_text(json.dumps(found))
    distributed.shutdown()


def _now() -> float:
    import time

    return time.perf_counter()


def count_bytes(file: Path) -> None:
    """Train one step and write the bytes that FSDP2's collectives of the update have sent."""
    from oprd.training import trainer
    from oprd.training.trainer import Trainer

    sent = {"all-gather": 0, "reduce-scatter": 0}
    is_counted = False
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def counting_gather(output_tensor, *args, **kwargs):
        sent["all-gather"] += is_counted * output_tensor.nbytes
        return gather(output_tensor, *args, **kwargs)

    def counting_scatter(output, input, *args, **kwargs):
        sent["reduce-scatter"] += is_counted * input.nbytes
        return scatter(output, input, *args, **kwargs)

    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = counting_gather, counting_scatter
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
    launched(
        ranks, "oprd.cli.train", "--output_dir", run, "--steps", str(steps),
        "--fsdp.mode", "always", "--eval.sets", "{}", "--eval.teacher", "false",
        "--logging.diagnostics_every", "0", "--rollout.prompts_per_step", str(prompts),
    )  # fmt: skip
    return read(run, "", "").model.measured


def part_seconds(p: Predicted) -> float:
    """Return the seconds that are compared: of teacher, update and optimizer."""
    return p.teacher + p.update + p.waiting + (p.optimizer or 0.0)


def measured_seconds(m: Measured) -> float:
    """Return the same of a run."""
    return m.teacher + m.update + (m.optimizer or 0.0)


def check(ranks: list[int], steps: int, rounds: int, directory: Path) -> dict:
    """Measure, predict and return both."""
    cores = len(os.sched_getaffinity(0))
    timed, machines = {}, {1: machine(1, cores)}
    for n in (n for n in ranks if n > 1):
        machines[n], timed[n] = links(directory, n, 30, cores)
    seconds: dict[tuple[Scaling, int], list[float]] = {}
    first: list[Measured] = []
    for again in range(rounds):  # in turns, so that what changes on the machine reaches all
        for scaling in ("weak", "strong"):
            for n in ranks:
                if n == 1 and scaling == "strong":
                    continue
                found = trained(directory, n, scaling, steps, again)
                seconds.setdefault((scaling, n), []).append(measured_seconds(found))
                if n == 1:
                    first.append(found)
    if 1 in ranks:
        seconds["strong", 1] = seconds["weak", 1]
    source = read(directory / "weak-1-0", "", "")
    middle = sorted(first, key=measured_seconds)[len(first) // 2]
    model = Model(middle, source.model.student, source.model.teacher)
    rows = [
        {
            "scaling": scaling,
            "ranks": n,
            "predicted": part_seconds(p := predict(model, machines[n], n, scaling)),
            "waiting": p.waiting,
            "measured": median(seconds[scaling, n]),
            "rounds": seconds[scaling, n],
        }
        for scaling in ("weak", "strong")
        for n in ranks
    ]
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
            f"{row['predicted']:.3f}",
            f"{row['waiting']:.3f}",
            f"{row['measured']:.3f}",
            f"{min(row['rounds']):.3f} to {max(row['rounds']):.3f}",
            f"{row['predicted'] / row['measured'] - 1:+.0%}",
        ]
        for row in found["rows"]
    ]
    heads = ("scaling", "ranks", "predicted\ns", "of it\nlinks s", "measured\ns", "rounds", "error")
    notes = [
        f"Seconds of teacher, update and optimizer in a step of the demo, on {found['cores']} "
        "cores. The first row of each is measured, not predicted. Gloo's links, fitted to an "
        "all-gather's seconds:"
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

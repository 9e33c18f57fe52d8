"""What `overlap` gains: a step's passes with the teacher ahead and without, in turns.

    python -m benchmarks.overlap                 # the paper's shape on a GPU, a small one on a CPU
    python -m benchmarks.overlap --batches 8 --tokens 2048 --output overlap.json

Random weights and rollouts; teacher and student are of one shape. Timed is what training runs
(`StudentUpdate._backward`): every micro-batch's teacher pass, the student's forward and backward.
Both ways must give the same losses and gradients, bit for bit. The option is kept only if it gains.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from oprd.atomic_files import write_json
from oprd.benchmark.config import SHAPE_FLAGS, GainsConfig
from oprd.benchmark.gains_plan import model_config
from oprd.benchmark.report import PAPER_SHAPE, machine
from oprd.config.demo import demo_config
from oprd.data.rollout import Rollout
from oprd.distill.distiller import Distiller
from oprd.distill.objectives import Objectives
from oprd.distributed.device import check_device
from oprd.memory_plan.shapes import Shape
from oprd.models.recompute import recompute_blocks
from oprd.observability.memory import GIB
from oprd.observability.tables import TextTable, show
from oprd.observability.timer import PhaseTimer
from oprd.training.batches import GlobalBatch, global_batch
from oprd.training.overlap import side_stream
from oprd.training.update import StudentUpdate

SMALL = Shape(d=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=128, vocab=99,
              tied=True)  # fmt: skip


def build(shape: Shape, tokens: int, device: torch.device) -> StudentUpdate:
    """Make the update of a run, whose micro-batches hold ``tokens`` tokens."""
    from transformers import AutoModelForCausalLM

    flags = {name: getattr(shape, name) for name in SHAPE_FLAGS}
    config = model_config(GainsConfig(tokens=tokens, **flags))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    student, teacher = (
        AutoModelForCausalLM.from_config(config, dtype=dtype).to(device) for _ in range(2)
    )
    recompute_blocks(student, True)
    cfg = demo_config()
    cfg.micro_batch_tokens = tokens
    distiller = Distiller(student, teacher.requires_grad_(False), cfg.distill)
    objectives = Objectives(
        {"oprd": 1.0}, student, {"": teacher}, {"": distiller}, cfg.distill, cfg.opd
    )
    inputs: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    return StudentUpdate(
        cfg,
        inputs,
        student,
        objectives,
        sharded=False,
        recomputed=shape.layers,
        timer=PhaseTimer(device),
        autocast=nullcontext,
        directory=Path(),
        device=device,
    )


def work_of(update: StudentUpdate, batches: int, tokens: int, vocab: int) -> GlobalBatch:
    """Make the rollouts of a step: of two lengths, two in a micro-batch."""
    draw = random.Random(0)
    rollouts = []
    for i in range(2 * batches):
        length = tokens // 2 - (i % 2) * tokens // 8
        ids = [draw.randrange(1, vocab) for _ in range(length)]
        rollouts.append(Rollout(ids[: length // 8], ids[length // 8 :], True))
    return global_batch(rollouts, update.objectives, update.cfg, 0, {}, update.device)


def passes(update: StudentUpdate, work: GlobalBatch, ahead: bool) -> dict[str, Any]:
    """Run a step's passes; return seconds, seconds by phase, peak memory, loss and gradients."""
    device = update.device
    update.cfg.overlap = ahead
    update.stream = side_stream(update.cfg, device)
    for p in update.student.parameters():
        p.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    outputs, peaks, _ = update._backward(work, 0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    sums = [p.grad.double().abs().sum() for p in update.student.parameters() if p.grad is not None]
    return {
        "seconds": seconds,
        "phases": update.timer.take_step(),
        "delta_peak": max((p.delta or 0) for p in peaks),
        "loss": torch.stack([o.loss.detach() for o in outputs]).tolist(),
        "gradients": torch.stack(sums).tolist(),
    }


def compare(shape: Shape, batches: int, tokens: int, rounds: int, device: torch.device) -> dict:
    """Measure both ways in turns; the first round of each warms up and is left out."""
    update = build(shape, tokens, device)
    work = work_of(update, batches, tokens, shape.vocab)
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for _ in range(rounds + 1):
        for ahead, results in found.items():
            results.append(passes(update, work, ahead))
    rows = {}
    for ahead, results in found.items():
        kept = results[1:]
        rows["ahead" if ahead else "in turn"] = {
            "seconds": median(r["seconds"] for r in kept),
            "rounds": [r["seconds"] for r in kept],
            "phases": {p: median(r["phases"][p] for r in kept) for p in kept[0]["phases"]},
            "delta_peak_bytes": max(r["delta_peak"] for r in kept),
        }
    same = [
        {(tuple(r["loss"]), tuple(r["gradients"])) for r in results} for results in found.values()
    ]
    return {
        "machine": machine(device),
        "micro_batches": len(work.micro_batches),
        "tokens": tokens,
        "rows": rows,
        "gain": rows["in turn"]["seconds"] / rows["ahead"]["seconds"],
        "equal": same[0] == same[1] and len(same[0]) == 1,
        # Whether one way alone repeats itself, without which nothing can be said.
        "repeats": [len(s) == 1 for s in same],
    }


def table(found: dict) -> TextTable:
    """Make the table of what `compare` has found."""
    rows = [
        [
            name,
            f"{row['seconds']:.3f}",
            f"{min(row['rounds']):.3f} to {max(row['rounds']):.3f}",
            f"{row['phases'].get('teacher', 0):.3f}",
            f"{row['phases'].get('student update', 0):.3f}",
            f"{row['delta_peak_bytes'] / GIB:.2f}",
        ]
        for name, row in found["rows"].items()
    ]
    heads = (
        "teacher",
        "passes\ns",
        "rounds",
        "wait for\nteacher s",
        "student\ns",
        "delta-peak\nGiB",
    )
    what = "equal, bit for bit" if found["equal"] else f"NOT equal (repeats: {found['repeats']})"
    notes = [
        f"{found['micro_batches']} micro-batches of {found['tokens']} tokens on "
        f"{found['machine']['device']}. Losses and gradients are {what}. In turn / ahead: "
        f"{found['gain']:.3f}."
    ]
    return TextTable("overlap: the teacher a micro-batch ahead, and in turn", heads, rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="of a micro-batch; default: 16384, 128 on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    device = check_device(options.device)
    on_gpu = device.type == "cuda"
    tokens = options.tokens or (16384 if on_gpu else 128)
    shape = PAPER_SHAPE if on_gpu else SMALL
    found = compare(shape, options.batches, tokens, options.rounds, device)
    show(Console(highlight=False), [table(found)])
    if options.output:
        write_json(options.output, found)


if __name__ == "__main__":
    main()

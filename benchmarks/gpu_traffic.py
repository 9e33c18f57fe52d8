"""Bytes that the Triton kernels move, counted in the interpreter, and the time they would take.

python -m benchmarks.gpu_traffic [--output benchmarks/results/gpu_traffic.md]

Activations (hidden states, gradients) against the least that each mode can do with (design.md).
Above 128 ranks two neighbouring programs read the same states, the second out of L2, which counts
twice here; and where a block has more rows than there are (256 in bfloat16), those read the first
row, out of L1, which counts again. Reads of the projectors themselves apart; what lies in the
workspace and in ``saved`` (statistics, dz, sums of a few floats a row; the projectors' terms, which
a GPU serves out of L2) as "other". The times are a roofline PREDICTION from data-sheet peaks: no
GPU was measured.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import interpreter
from oprd_kernels.backends import triton as triton_backend
from oprd_kernels.call import GradCall, LossCall

ACTIVATIONS = ("student", "teacher", "grad", "students", "teachers", "grads")
PROJECTORS = ("student_proj", "teacher_proj", "teacher_mean")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, WIDTH, TEACHER_WIDTH = 128, 512, 640

# Data-sheet peaks: GB/s of memory, TFLOP/s of dense bf16 tensor cores. NVIDIA A100 80GB SXM, H100
# SXM, B200; AMD Instinct MI300X.
DEVICES = {
    "A100": (2039, 312),
    "H100": (3350, 989),
    "B200": (8000, 2250),
    "MI300X": (5300, 1307),
}


@dataclass(frozen=True)
class Regime:
    """A mode and what it must move: ``reads`` of M dS e, of M dT e, ``writes`` of M dS e."""

    name: str
    student_reads: int
    teacher_reads: int
    writes: int
    rank: int = 0
    products: int = 0


REGIMES = (
    Regime("identity forward", 1, 1, 0),
    Regime("identity in place", 1, 1, 1),
    Regime("identity, rep_tap backward", 2, 1, 1),
    Regime("projected forward", 1, 1, 0, rank=8, products=2),
    Regime("projected, rep_tap backward", 1, 0, 1, rank=8, products=1),
    Regime("projected forward", 1, 1, 0, rank=64, products=2),
    Regime("projected, rep_tap backward", 1, 0, 1, rank=64, products=1),
    Regime("projected forward", 1, 1, 0, rank=256, products=2),
    Regime("projected, rep_tap backward", 1, 0, 1, rank=256, products=1),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes a regime's launches load and store, and the least it could do with."""

    activations: int
    floor: int
    projectors: int
    other: int


def count(regime: Regime, dtype: str, rows: torch.Tensor | None = None) -> Traffic:
    """Run ``regime`` in the interpreter on ROWS rows and count.

    Args:
        rows: pick these of four times as many rows of the student.
    """
    torch.manual_seed(0)
    d_t = TEACHER_WIDTH if regime.rank else WIDTH
    e = DTYPES[dtype].itemsize
    student = torch.randn(ROWS if rows is None else 4 * ROWS, WIDTH).to(DTYPES[dtype])
    teacher = torch.randn(ROWS, d_t).to(DTYPES[dtype])
    projectors: list[torch.Tensor | None] = [None] * 3
    if regime.rank:
        projectors = [torch.randn(regime.rank, d) for d in (WIDTH, d_t)] + [torch.randn(d_t)]
    grad = teacher if regime.name.endswith("in place") else None
    backend = triton_backend.BACKEND
    with interpreter.recorded() as launches:
        _, saved = backend.forward(LossCall(student, teacher, *projectors, rows), grad)
    if regime.name.endswith("backward"):
        wide = (None, None) if regime.rank else (student, teacher)
        with interpreter.recorded() as launches:
            call = GradCall(saved, *wide, projectors[0], rows)
            backend.backward_(call, torch.zeros_like(student), True, torch.ones(()))
    totals = {"activations": 0, "projectors": 0, "other": 0}
    for launch in launches:
        for moved in (launch.loaded, launch.stored):
            for name, size in moved.items():
                kind = "activations" if name in ACTIVATIONS else "other"
                totals["projectors" if name in PROJECTORS else kind] += size
    floor = (regime.student_reads + regime.writes) * ROWS * WIDTH * e
    floor += regime.teacher_reads * ROWS * d_t * e
    return Traffic(floor=floor, **totals)


def predicted_milliseconds(regime: Regime, dtype: str, device: str, m: int, d: int) -> float:
    """The larger of bytes over peak bandwidth and operations over peak rate; d wide both sides."""
    bandwidth, tensor = DEVICES[device]
    e = DTYPES[dtype].itemsize
    size = (regime.student_reads + regime.teacher_reads + regime.writes) * m * d * e
    flops = 2.0 * regime.products * m * d * max(regime.rank, 16 if regime.rank else 0)
    backward = regime.name.endswith("backward")
    # In 16-bit terms, see backends/triton/operands.py.
    products = 6 if dtype == "fp32" else 1 if backward else 2
    seconds = flops * products / (tensor * 1e12)
    return max(size / (bandwidth * 1e9), seconds) * 1e3


def report() -> str:
    """Both tables."""
    lines = [
        "| regime | r | dtype | activation bytes / floor | projector bytes / floor | other bytes / floor |",  # noqa: E501
        "|---|---|---|---|---|---|",
    ]
    for regime in REGIMES:
        for dtype in DTYPES:
            t = count(regime, dtype)
            ratios = [f"{x / t.floor:.3f}" for x in (t.activations, t.projectors, t.other)]
            cells = (regime.name, regime.rank or "-", dtype, *ratios)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"Counted on {ROWS} rows, {WIDTH} <- {TEACHER_WIDTH} wide. Projector bytes shrink relative "
        "to the rest as more rows share a block.",
        "",
        "PREDICTION, not a measurement: milliseconds for 65,536 rows, 2,048 wide on both sides, at "
        "the data sheets' peaks.",
        "",
        "| regime | r | dtype | " + " | ".join(DEVICES) + " |",
        "|---|---|---|" + "---|" * len(DEVICES),
    ]
    for regime in REGIMES:
        for dtype in DTYPES:
            times = [predicted_milliseconds(regime, dtype, gpu, 65536, 2048) for gpu in DEVICES]
            cells = (regime.name, regime.rank or "-", dtype, *(f"{t:.2f}" for t in times))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(output: Path | None = None) -> None:
    """Count and print.

    Args:
        output: also write the tables there.
    """
    interpreter.install()
    text = "`python -m benchmarks.gpu_traffic`\n\n" + report()
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)

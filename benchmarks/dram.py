"""One call of each kind, for ncu to count the bytes that go through DRAM.

ncu --metrics dram__bytes_read.sum,dram__bytes_write.sum --clock-control none \
    --print-units base --profile-from-start off --csv python -m benchmarks.dram SECTIONS.json

Before each call goes a kernel that only sleeps: `sections` tells by it whose kernels are whose.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import available
from benchmarks.regimes import DTYPES, flow, states
from oprd_kernels import BackendUnavailable, fused_rep_loss, rep_tap

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_MARK = "spin_kernel"
"""torch.cuda._sleep's."""

Section = tuple[str, int, Callable[[], object]]


def calls(backend: str, m: int, d: int) -> Iterator[Section]:
    """Name, bytes of the floor, and the call; a forward's loss is the next call's."""
    e, d_t = DTYPES["bf16"].itemsize, d * 5 // 4
    x, teacher = states(m, d, "bf16").requires_grad_(), states(m, d, "bf16", 1)
    one = m * d * e
    last: list[Tensor] = []

    def forward(**options: Any) -> Callable[[], object]:
        return lambda: last.append(fused_rep_loss(x, backend=backend, **options))

    def backward() -> object:
        return torch.autograd.grad(last.pop(), x)

    yield f"identity forward, {backend}", 2 * one, forward(teacher=teacher)
    yield f"identity backward, {backend}", 3 * one, backward
    tap = flow(lambda h: rep_tap(h, teacher, backend=backend), x, False)
    yield f"rep_tap, {backend}", 6 * one, tap
    for rank in (8, 64, 256):
        wide = states(m, d_t, "bf16", 1)
        projectors = {
            "student_proj": states(rank, d, "fp32", 2) / d**0.5,
            "teacher_proj": states(rank, d_t, "fp32", 3) / d_t**0.5,
            "teacher_mean": wide.float().mean(0),
        }
        run = forward(teacher=wide, **projectors)
        yield f"Bridge r = {rank} forward, {backend}", m * (d + d_t) * e, run
        yield f"Bridge r = {rank} backward, {backend}", one, backward
    yield f"identity in place, {backend}", 3 * one, forward(teacher=teacher, inplace=True)


def main() -> None:
    """Run them all twice, the second time under the profiler's eyes; write name and floor."""
    ran: list[Section] = []
    for backend in available():
        ran += [s for s in calls(backend, 131072, 2048) if _runs(s[2])]
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _, _, call in ran:
        torch.cuda._sleep(1)
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    named = [{"what": what, "floor_bytes": floor_bytes} for what, floor_bytes, _ in ran]
    Path(sys.argv[1]).write_text(json.dumps(named))


def _runs(call: Callable[[], object]) -> bool:
    """Call it; whether this backend does it (a backward: whether it did the forward)."""
    try:
        call()
    except (BackendUnavailable, IndexError):
        return False
    return True


def sections(named: list[dict[str, Any]], log: str) -> list[dict[str, Any]]:
    """Bytes read and written by each call, from ncu's CSV, whatever else is printed around it.

    Raises:
        ValueError: if the log does not hold a section for each name.
    """
    lines = log.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        raise ValueError("ncu printed no table: " + " ".join(lines[-3:])[:300])
    table = [line for line in lines[starts[0] :] if line.startswith('"')]
    found: list[dict[str, Any]] = []
    for row in csv.DictReader(table):
        kernel, launch = row["Kernel Name"].split("(")[0], row["ID"]
        if _MARK in kernel:
            if not found or found[-1]["launches"]:
                found.append({"launches": {}, "read_bytes": 0.0, "write_bytes": 0.0})
        elif found and row["Metric Name"] in METRICS:
            found[-1]["launches"][launch] = kernel
            column = "read_bytes" if "read" in row["Metric Name"] else "write_bytes"
            found[-1][column] += float(row["Metric Value"].replace(",", ""))
    found = [one for one in found if one["launches"]]
    if len(found) != len(named):
        raise ValueError(f"ncu saw {len(found)} calls of {len(named)}")
    for one in found:
        one["kernels"] = list(one.pop("launches").values())
    return [name | one for name, one in zip(named, found, strict=True)]


if __name__ == "__main__":
    main()

"""The table of the kernels on a GPU: device time, host time, distance to the floor, memory.

python -m benchmarks.gpu_table OUT.json [--seconds 120]

The file is written after every case, so that what is measured is kept whatever comes next. Kernels
are compiled ahead, by several processes at once, into the disk caches of Triton and torch.compile.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_time
from benchmarks.gpu_cases import GpuCase, Variant, available, cases, host_calls, ours
from benchmarks.gpu_time import Recorded
from benchmarks.regimes import DTYPES, device, states
from oprd_kernels import BackendUnavailable

_MOST_SETS = 32
_COMPILING = 8
"""Processes that compile ahead."""


@dataclass(frozen=True)
class Row:
    """One variant of one case. Times in microseconds.

    Attributes:
        device_us: of loss and gradient; forward_us: of the loss alone, where it is known.
        host_us: until the call returns.
        floor_us: the larger of bytes over copy bandwidth and operations over GEMM peak, ``bound``
            says which.
        extra_bytes: peak memory above what was there, results included.
        method: see `gpu_time.Recorded`.
        problem: why it was not measured.
    """

    group: str
    what: str
    m: int
    d: int
    dtype: str
    variant: str
    floor_us: float
    bound: str
    device_us: float | None = None
    forward_us: float | None = None
    host_us: float | None = None
    extra_bytes: int | None = None
    method: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Rates:
    """What this machine does: bytes a second of a copy (read and written), operations a second of
    a square product, by dtype (fp32 without TF32)."""

    copy: float
    gemm: dict[str, float]

    def floor(self, case: GpuCase) -> tuple[float, str]:
        """Seconds, and what they are of."""
        moving, computing = case.floor_bytes / self.copy, case.floor_flops / self.gemm[case.dtype]
        return max((moving, "bytes"), (computing, "FLOPs"))


def measure_rates(tiny: bool = False) -> Rates:
    """By the harness that the kernels are timed by."""
    rows, n = (64, 32) if tiny else (131072, 8192)
    source, target = states(rows, 2048, "fp32"), states(rows, 2048, "fp32")
    # By a kernel, as in a graph copy_ is left to the copy engine, at two thirds of the bandwidth.
    recorded = gpu_time.record([lambda: torch.neg(source, out=target)])
    copy = _median({"copy": recorded}, 0.2)["copy"]
    gemm = {}
    for dtype, kind in DTYPES.items():
        a, b = (torch.randn(n, n, device=device()).to(kind) for _ in range(2))
        torch.mm(a, b)
        recorded = gpu_time.record([lambda a=a, b=b: torch.mm(a, b)])
        gemm[dtype] = 2 * n**3 / _median({"gemm": recorded}, 0.3)["gemm"]
    return Rates(2 * source.nbytes / copy, gemm)


def _median(recorded: dict[str, Recorded], budget: float) -> dict[str, float]:
    times = gpu_time.in_turns(recorded, budget, 7)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_case(case: GpuCase, rates: Rates, budget: float) -> list[Row]:
    """Every variant, in turns on sets of inputs that together are four times the L2 cache.

    Raises:
        RuntimeError: if the GPU is no longer usable.
    """
    sets = [case.make() for _ in range(_sets(case))]
    floor, bound = rates.floor(case)
    head = (case.group, case.what, case.m, case.d, case.dtype)
    rows, recorded, found = [], {}, {}
    for name in (*ours(), *(n for n in sets[0] if n not in ours())):
        variants = [one[name] for one in sets if name in one]
        try:
            if not variants:
                raise BackendUnavailable("not installed")
            found[name] = _prepare(variants)
            calls = [v.whole for v in variants]
            recorded[name] = gpu_time.record(calls, variants[0].in_graph)
            if forwards := [v.forward for v in variants if v.forward and name in ours()]:
                recorded[f"{name} forward"] = gpu_time.record(forwards)
        except Exception as error:
            gpu_time.synchronize()  # raises if the GPU is no longer usable
            problem = f"{type(error).__name__}: {error}"[:300]
            rows.append(Row(*head, name, floor * 1e6, bound, problem=problem))
            recorded.pop(name, None)
    medians = _median(recorded, budget)
    for name, one in recorded.items():
        if name not in found:
            continue
        forward = medians.get(f"{name} forward")
        host, extra = found[name]
        measured = {
            "device_us": medians[name] * 1e6,
            "forward_us": None if forward is None else forward * 1e6,
            "host_us": host * 1e6,
            "extra_bytes": extra,
            "method": one.method,
        }
        rows.append(Row(*head, name, floor * 1e6, bound, **measured))
    return rows


def _sets(case: GpuCase) -> int:
    if device().type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device()).L2_cache_size
    return min(max(-(-4 * cache // (case.floor_bytes // 2)), 1), _MOST_SETS)


def _prepare(variants: list[Variant]) -> tuple[float, int | None]:
    """Warm every call; host seconds and extra bytes of one."""
    for variant in variants:
        variant.whole()
    first = variants[0].whole
    first()
    return gpu_time.host_seconds(first, calls=5, repeats=3), gpu_time.extra_bytes(first)


def measure_host(tiny: bool) -> list[dict[str, Any]]:
    """Microseconds a call of the smallest shape, forward and with backward."""
    rows = []
    rounds = {"calls": 2, "repeats": 2} if tiny else {"calls": 100, "repeats": 9}
    for name, variant in host_calls().items():
        row: dict[str, Any] = {"call": name}
        with suppress(BackendUnavailable):
            for column, call in (("forward_us", variant.forward), ("both_us", variant.whole)):
                if call is not None:
                    for _ in range(3):
                        call()
                    row[column] = gpu_time.host_seconds(call, **rounds) * 1e6
        rows.append(row)
    return rows


def run(path: Path, seconds: float, tiny: bool) -> None:
    """Measure for so many seconds and write ``path``; what time did not suffice for is named."""
    start = time.monotonic()
    if not tiny:
        compile_ahead(seconds / 2)
    result: dict[str, Any] = {"backends": available(), "compiling_s": time.monotonic() - start}
    rates = measure_rates(tiny)
    result |= {"rates": asdict(rates), "host": measure_host(tiny), "rows": [], "left_out": []}
    for case in cases(tiny):
        if time.monotonic() - start > seconds:
            result["left_out"].append(case.name)
            continue
        try:
            rows = measure_case(case, rates, 0.01 if tiny else 0.15)
        except RuntimeError as error:
            result["stopped_by"] = f"{case.name}: {error}"
            break
        finally:
            tidy()
        result["rows"] += map(asdict, rows)
        path.write_text(json.dumps(result, indent=1) + "\n")
        measured = [f"{r.variant} {r.device_us:.1f}" for r in rows if r.device_us]
        print(f"{case.name}: floor {rows[0].floor_us:.1f}, {', '.join(measured)} us", flush=True)
        for row in rows:
            if row.problem:
                print(f"  {row.variant}: {row.problem}", flush=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if "stopped_by" in result:
        sys.exit(f"stopped: {result['stopped_by']}")


def tidy() -> None:
    """Let go of graphs and what they hold."""
    gc.collect()
    if device().type == "cuda":
        with suppress(RuntimeError):  # a capture that failed may forbid it
            torch.cuda.empty_cache()


def compile_ahead(seconds: float) -> None:
    """Start processes that call each variant once, and wait for them for so long."""
    count = min(_COMPILING, max((os.cpu_count() or 2) // 2, 1))
    command = [sys.executable, "-m", "benchmarks.gpu_table", "-", "--compile"]
    started = [
        subprocess.Popen([*command, f"{part}/{count}"], stderr=subprocess.DEVNULL)
        for part in range(count)
    ]
    end = time.monotonic() + seconds
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0))
        process.kill()
        process.wait()


def call_once(part: int, parts: int, tiny: bool) -> None:
    """One of `compile_ahead`'s processes: every ``parts``-th case."""
    for case in list(cases(tiny))[part::parts]:
        for name, variant in _compiled_variants(case):
            try:
                variant.whole()
            except Exception as error:  # the table's own process tells
                print(f"{case.name}, {name}: {error}"[:300], flush=True)
        tidy()


def _compiled_variants(case: GpuCase) -> Iterator[tuple[str, Variant]]:
    for name, variant in case.make().items():
        if name in (*ours(), "compile", "liger"):
            yield name, variant


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU")
    parser.add_argument("--compile", metavar="PART/PARTS", help="call each kernel once, for caches")
    given = parser.parse_args()
    if given.compile:
        part, parts = map(int, given.compile.split("/"))
        call_once(part, parts, given.tiny)
    else:
        run(given.out, given.seconds, given.tiny)


if __name__ == "__main__":
    main()

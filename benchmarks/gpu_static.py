"""What the GPU kernels compile to, read without a GPU: registers, spills, load widths, occupancy.

python -m benchmarks.gpu_static [--arch sm90] [--output benchmarks/results/gpu_static.md] [--json]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import gpu_cuda
from benchmarks.gpu_code import Code, Missing
from benchmarks.gpu_triton import CASES, TARGETS, compiled_code

HEAD = (
    *("backend", "kernel", "call", "target", "warps", "registers", "shared KiB", "spill bytes"),
    *("local ld/st", "128-bit loads", "128-bit stores", "narrower", "matrix instructions"),
    "occupancy",
)


def triton_rows(archs: list[str]) -> list[tuple[str, str, Code]]:
    """(backend, call, code) of every kernel that the calls of `CASES` launch, each once."""
    rows, seen = [], set()
    for arch in archs:
        for case in CASES:
            for code in compiled_code(case, arch):
                if code not in seen:
                    seen.add(code)
                    rows.append(("triton", str(case), code))
    return rows


def cuda_rows(archs: list[str]) -> list[tuple[str, str, Code]]:
    """The same for the CUDA C++ kernels, whose variants are named after their parameters."""
    wanted = [arch for arch in gpu_cuda.ARCHITECTURES if arch in archs]
    return [("cuda", unit, code) for unit, code in gpu_cuda.codes(architectures=wanted)]


def markdown(rows: list[tuple[str, str, Code]]) -> str:
    """The table."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for backend, call, c in rows:
        cells = (
            *(backend, c.kernel, call, c.arch, c.warps, c.registers, f"{c.shared / 1024:.1f}"),
            *(c.spill, c.local, c.vector_loads, c.vector_stores, c.narrow),
            *(", ".join(c.matrix) or "-", f"{c.occupancy:.0%}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(
    arch: list[str] | None = None,
    backend: list[str] | None = None,
    output: Path | None = None,
    json_lines: bool = False,
) -> None:
    """Compile for GPUs that need not be here and print what came out.

    Args:
        arch: targets, of sm80, sm90, sm100 and gfx942; default: all.
        backend: of triton and cuda; default: both.
        output: also write the table there.
        json_lines: print one JSON object a kernel instead of the table.
    """
    archs, backends = arch or list(TARGETS), backend or ["triton", "cuda"]
    rows = triton_rows(archs) if "triton" in backends else []
    if "cuda" in backends:
        try:
            rows += cuda_rows(archs)
        except Missing as reason:
            print(f"no CUDA kernels in this table: {reason}", file=sys.stderr)
    if json_lines:
        for name, call, code in rows:
            print(json.dumps({"backend": name, "call": call} | asdict(code)))
        return
    table = markdown(rows)
    print(table)
    if output is not None:
        command = " ".join(["python -m benchmarks.gpu_static", *sys.argv[1:]])
        output.write_text(f"`{command}`\n\n{table}\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)

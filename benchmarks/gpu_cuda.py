"""What nvcc makes of the CUDA kernels, read without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_code import Code, Missing, find_cuobjdump, read_cubin, run

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
UNITS = ("fp32", "bf16", "fp16", "reduce")
ARCHITECTURES = ("sm80", "sm90", "sm100")
FLAGS = ("-std=c++17", "-O3", "-fmad=false")
"""As CMakeLists.txt has them."""


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        Missing: if there is none.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise Missing("nvcc is not on PATH")
    return nvcc


def is_vectorised(code: Code) -> bool:
    """Whether this is a variant for rows that can be read in vectors of 16 bytes."""
    return re.search(r"\btrue\b|Lb1E|tensor_forward", code.kernel) is not None


def codes(
    units: Sequence[str] = UNITS, architectures: Sequence[str] = ARCHITECTURES
) -> list[tuple[str, Code]]:
    """(unit, code) of every kernel: compiles as many units at a time as there are cores.

    Raises:
        Missing: if nvcc or cuobjdump is not here.
        RuntimeError: if a unit does not compile, with the compiler's output.
    """
    nvcc = find_nvcc()
    find_cuobjdump()

    def compiled(job: tuple[str, str]) -> list[tuple[str, Code]]:
        unit, arch = job
        cubin = Path(directory) / f"{unit}.{arch}.cubin"
        target = f"-arch={arch.replace('sm', 'sm_')}"
        run(
            nvcc, *FLAGS, f"-I{SOURCES}", f"-I{SOURCES / 'gpu'}", target, "-cubin", "-o", cubin,
            SOURCES / f"{unit}.cu",
        )  # fmt: skip
        kernels = read_cubin(cubin.read_bytes(), arch)
        names = _readable([kernel.kernel for kernel in kernels])
        return [
            (unit, replace(kernel, kernel=name))
            for kernel, name in zip(kernels, names, strict=True)
        ]

    jobs = [(unit, arch) for unit in units for arch in architectures]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(compiled, jobs) for row in rows]


def _readable(symbols: list[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return symbols
    short = []
    for name in run("c++filt", *symbols).splitlines():
        name = re.sub(r"(oprd::|cuda::|\(anonymous namespace\)::|\(oprd::DType\)|^void )", "", name)
        short.append(re.sub(r"\(.*\)$", "", name.replace("(DType)", "")))
    return short

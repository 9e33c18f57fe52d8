"""What nvcc makes of the CUDA kernels, read without a GPU: registers, shared memory, spills, the
width of global loads and stores, and from these an estimate of occupancy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
UNITS = ("fp32", "bf16", "fp16", "reduce")
ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v")
"""As CMakeLists.txt has them."""

# Per streaming multiprocessor, from the CUDA C++ Programming Guide's table of compute capabilities.
REGISTERS = 65536
MAX_WARPS = 64
MAX_BLOCKS = 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED_BYTES = {80: 1024, 90: 0, 100: 0}  # per block, where cubins do not count it
WARP = 32


class Missing(Exception):
    """A tool that is needed is not here; the message says which."""


@dataclass(frozen=True)
class KernelReport:
    """One kernel in one unit's machine code for one architecture.

    Attributes:
        threads: the largest block it may be launched with.
        local_accesses: instructions that touch local memory (LDL, STL), spills or arrays.
        loads_128, stores_128: instructions that move 16 bytes from and to global memory, copies
            straight to shared memory included.
    """

    unit: str
    kernel: str
    arch: int
    registers: int
    threads: int
    shared_bytes: int
    spill_bytes: int
    local_accesses: int
    loads_128: int
    stores_128: int

    @property
    def occupancy(self) -> float:
        """Estimated from the registers and shared memory of an SM; the largest block is assumed."""
        warps = -(-self.threads // WARP)
        registers_per_warp = -(-self.registers * WARP // 256) * 256  # allocated in units of 256
        blocks = min(
            MAX_BLOCKS,
            MAX_WARPS // warps,
            REGISTERS // registers_per_warp // warps,
            SHARED_BYTES[self.arch] // max(self.shared_bytes + RESERVED_SHARED_BYTES[self.arch], 1),
        )
        return blocks * warps / MAX_WARPS

    @property
    def is_vectorised(self) -> bool:
        """Whether this is a variant for rows that can be read in vectors of 16 bytes."""
        return re.search(r"\btrue\b|Lb1E", self.kernel) is not None


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        Missing: if there is none.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise Missing("nvcc is not on PATH")
    return nvcc


def find_cuobjdump() -> str:
    """Path of cuobjdump: the CUDA toolkit's, or the one that Triton ships.

    Raises:
        Missing: if there is neither.
    """
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        raise Missing("cuobjdump is neither on PATH nor in an installed triton") from None
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not found.exists():
        raise Missing(f"cuobjdump is neither on PATH nor at {found}")
    return str(found)


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_unit(unit: str, arch: int, cubin: Path) -> str:
    """Compile one translation unit to machine code; returns what ptxas says of it."""
    includes = (f"-I{SOURCES}", f"-I{SOURCES / 'gpu'}")
    return _run(
        find_nvcc(), *FLAGS, *includes, f"-arch=sm_{arch}", "-cubin", "-o", cubin,
        SOURCES / f"{unit}.cu",
    )  # fmt: skip


def _readable(symbols: Sequence[str]) -> dict[str, str]:
    """Names as in the source, without namespaces and parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return dict(zip(symbols, symbols, strict=True))
    names = _run("c++filt", *symbols).splitlines()
    short = []
    for name in names:
        name = re.sub(r"(oprd::|cuda::|\(anonymous namespace\)::|\(oprd::DType\)|^void )", "", name)
        short.append(re.sub(r"\(.*\)$", "", name.replace("(DType)", "")))
    return dict(zip(symbols, short, strict=True))


def _spills(ptxas: str) -> Iterator[tuple[str, int]]:
    """(symbol, bytes spilled) from ptxas -v."""
    symbol = ""
    for line in ptxas.splitlines():
        if found := re.search(r"entry function '(\w+)'", line):
            symbol = found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            yield symbol, int(found[1]) + int(found[2])


def _instructions(cuobjdump: str, cubin: Path) -> dict[str, list[str]]:
    """The opcodes of each function."""
    found: dict[str, list[str]] = {}
    symbol = ""
    for line in _run(cuobjdump, "-sass", cubin).splitlines():
        if start := re.search(r"Function : (\w+)", line):
            symbol = start[1]
            found[symbol] = []
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found[symbol].append(code[1])
    return found


def _max_threads(cuobjdump: str, cubin: Path) -> dict[str, int]:
    """The launch bounds of each function, from its attributes."""
    found: dict[str, int] = {}
    symbol, awaited = "", False
    for line in _run(cuobjdump, "-elf", cubin).splitlines():
        if start := re.search(r"\.nv\.info\.(\w+)", line):
            symbol = start[1]
        elif "EIATTR_MAX_THREADS" in line:
            awaited = True
        elif awaited and (value := re.search(r"Value:\s+(0x[0-9a-f]+)", line)):
            found[symbol] = int(value[1], 16)
            awaited = False
    return found


def read_cubin(unit: str, arch: int, cubin: Path, ptxas: str) -> list[KernelReport]:
    """A report for every kernel in a cubin, of which ptxas said ``ptxas``."""
    cuobjdump = find_cuobjdump()
    usage = _run(cuobjdump, "--dump-resource-usage", cubin)
    resources = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", usage))
    spills = dict(_spills(ptxas))
    threads = _max_threads(cuobjdump, cubin)
    names = _readable(list(resources))
    reports = []
    for symbol, opcodes in _instructions(cuobjdump, cubin).items():
        numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", resources[symbol])}
        reports.append(
            KernelReport(
                unit=unit,
                kernel=names[symbol],
                arch=arch,
                registers=numbers["REG"],
                threads=threads[symbol],
                shared_bytes=numbers["SHARED"],
                spill_bytes=spills[symbol],
                local_accesses=_count(opcodes, r"(LDL|STL)\b"),
                loads_128=_count(opcodes, r"(LDG|LDGSTS)\b.*\.128"),
                stores_128=_count(opcodes, r"STG\b.*\.128"),
            )
        )
    return reports


def _count(opcodes: Iterable[str], pattern: str) -> int:
    return sum(re.match(pattern, opcode) is not None for opcode in opcodes)


def reports(
    units: Sequence[str] = UNITS, architectures: Sequence[int] = ARCHITECTURES
) -> list[KernelReport]:
    """Compile the units, as many at a time as there are cores, and read them.

    Raises:
        Missing: if nvcc or cuobjdump is not here.
        RuntimeError: if a unit does not compile, with the compiler's output.
    """
    find_nvcc(), find_cuobjdump()

    def report(job: tuple[str, int]) -> list[KernelReport]:
        unit, arch = job
        cubin = Path(directory) / f"{unit}.sm_{arch}.cubin"
        return read_cubin(unit, arch, cubin, compile_unit(unit, arch, cubin))

    jobs = [(unit, arch) for unit in units for arch in architectures]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(report, jobs) for row in rows]

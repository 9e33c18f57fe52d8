"""Reads compiled GPU code: registers, spills, shared memory, load widths, tensor-core instructions.

NVIDIA cubins through cuobjdump (the CUDA toolkit's, or the one that Triton ships), AMD from the
assembly text.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class Missing(Exception):
    """A tool that is needed is not here; the message says which."""


# Per multiprocessor (compute unit): registers, shared memory in bytes, threads, warps, from
# NVIDIA's CUDA C++ programming guide (compute capabilities 8.0, 9.0, 10.0) and AMD's CDNA3 ISA
# guide: 512 vector registers of 64 lanes for each of 4 SIMDs, 64 KiB of LDS, 32 waves.
LIMITS = {
    "sm80": (65536, 164 * 1024, 2048, 64),
    "sm90": (65536, 228 * 1024, 2048, 64),
    "sm100": (65536, 228 * 1024, 2048, 64),
    "gfx942": (4 * 512 * 64, 64 * 1024, 2048, 32),
}


@dataclass(frozen=True)
class Code:
    """What one compiled kernel needs and contains.

    Attributes:
        warps: of a program (block), the most it may be launched with.
        registers: per thread; shared: bytes per program, static and dynamic.
        spill: bytes of registers that do not fit and live in memory.
        local: instructions that load from or store to thread-local memory.
        vector_loads, vector_stores: instructions that move 128 bits of global memory, copies
            straight to shared memory included; narrow: other ones.
        matrix: tensor-core (matrix-core) instructions, by name.
    """

    kernel: str
    arch: str
    warps: int
    registers: int
    shared: int
    spill: int
    local: int
    vector_loads: int
    vector_stores: int
    narrow: int
    matrix: tuple[str, ...]

    @property
    def occupancy(self) -> float:
        """Estimated share of a multiprocessor's warps that registers and shared memory allow."""
        registers, shared, threads, warps = LIMITS[self.arch]
        lanes, reserved = (64, 0) if self.arch.startswith("gfx") else (32, 1024)
        per_warp = -(-max(self.registers, 1) // 8) * 8 * lanes  # allocated in units of 8 a thread
        programs = min(
            registers // (per_warp * self.warps),
            shared // (self.shared + reserved) if self.shared else warps,
            threads // (self.warps * lanes),
        )
        return min(programs * self.warps / warps, 1.0)


def find_cuobjdump() -> str:
    """Path of cuobjdump.

    Raises:
        Missing: if there is none.
    """
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        raise Missing("cuobjdump is neither on PATH nor in an installed triton") from None
    shipped = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not shipped.exists():
        raise Missing(f"cuobjdump is neither on PATH nor at {shipped}")
    return str(shipped)


def run(*command: str | Path) -> str:
    """What a command prints on either stream; RuntimeError with it if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read_cubin(
    cubin: bytes, arch: str, warps: int | None = None, dynamic_shared: int = 0
) -> list[Code]:
    """The kernels of a cubin.

    Args:
        warps: per program; None: what the launch bounds allow.
        dynamic_shared: bytes it is launched with, which a cubin does not know.
    """
    cuobjdump = find_cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(cuobjdump, "--dump-resource-usage", file.name)
        opcodes = _instructions(run(cuobjdump, "-sass", file.name))
        threads = _max_threads(run(cuobjdump, "-elf", file.name)) if warps is None else {}
    codes = []
    for symbol, line in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", usage):
        numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
        body = opcodes[symbol]
        moves = _count(body, r"(LDG|STG|LDGSTS)\b")
        loads = _count(body, r"(LDG|LDGSTS)\b.*\.128")
        stores = _count(body, r"STG\b.*\.128")
        matrix = {code for code in body if re.match(r"(HMMA|HGMMA|UTCHMMA)", code)}
        codes.append(
            Code(
                kernel=symbol,
                arch=arch,
                warps=warps or -(-threads[symbol] // 32),
                registers=numbers["REG"],
                shared=numbers["SHARED"] + dynamic_shared,
                spill=numbers["STACK"] + numbers["LOCAL"],
                local=_count(body, r"(LDL|STL)\b"),
                vector_loads=loads,
                vector_stores=stores,
                narrow=moves - loads - stores,
                matrix=tuple(sorted(matrix)),
            )
        )
    return codes


def _instructions(sass: str) -> dict[str, list[str]]:
    """The opcodes of each function."""
    found: dict[str, list[str]] = {}
    symbol = ""
    for line in sass.splitlines():
        if start := re.search(r"Function : (\w+)", line):
            symbol = start[1]
            found[symbol] = []
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found[symbol].append(code[1])
    return found


def _max_threads(elf: str) -> dict[str, int]:
    """The launch bounds of each function, from its attributes."""
    found: dict[str, int] = {}
    symbol, awaited = "", False
    for line in elf.splitlines():
        if start := re.search(r"\.nv\.info\.(\w+)", line):
            symbol = start[1]
        elif "EIATTR_MAX_THREADS" in line:
            awaited = True
        elif awaited and (value := re.search(r"Value:\s+(0x[0-9a-f]+)", line)):
            found[symbol] = int(value[1], 16)
            awaited = False
    return found


def read_amdgcn(text: str, arch: str, warps: int, shared: int) -> Code:
    """The kernel of an AMD assembly listing; ``shared``: bytes it is launched with."""

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    name = re.search(r"\.globl\s+(\S+)", text)
    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    opcodes = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    moves = _count(opcodes, r"(global|buffer)_(load|store)_")
    loads = _count(opcodes, r"(global|buffer)_load_dwordx4$")
    stores = _count(opcodes, r"(global|buffer)_store_dwordx4$")
    return Code(
        kernel=name.group(1) if name else "",
        arch=arch,
        warps=warps,
        registers=number("vgpr_count"),
        shared=shared,
        spill=4 * spilled + number("private_segment_fixed_size"),
        local=_count(opcodes, r"scratch_(load|store)"),
        vector_loads=loads,
        vector_stores=stores,
        narrow=moves - loads - stores,
        matrix=tuple(sorted({code for code in opcodes if code.startswith("v_mfma")})),
    )


def _count(opcodes: Iterable[str], pattern: str) -> int:
    return sum(re.match(pattern, opcode) is not None for opcode in opcodes)

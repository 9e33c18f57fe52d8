"""Reads compiled GPU code: registers, spills, shared memory, load widths, tensor-core instructions.

NVIDIA cubins through the cuobjdump and nvdisasm that Triton ships; AMD from the assembly text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
        registers: per thread; shared: bytes per program, static and dynamic.
        spill: bytes of registers that do not fit and live in memory.
        local: instructions that load from or store to thread-local memory.
        vector: instructions that load or store 128 bits of global memory; narrow: other ones,
            asynchronous copies to shared memory of 16 bytes counting as vector.
        matrix: tensor-core (matrix-core) instructions, by name.
    """

    kernel: str
    arch: str
    warps: int
    registers: int
    shared: int
    spill: int
    local: int
    vector: int
    narrow: int
    matrix: tuple[str, ...]

    @property
    def occupancy(self) -> float:
        """Estimated share of a multiprocessor's warps that registers and shared memory allow."""
        registers, shared, threads, warps = LIMITS[self.arch]
        lanes, reserved = (64, 0) if self.arch.startswith("gfx") else (32, 1024)
        per_warp = -(-max(self.registers, 1) // 8) * 8 * lanes
        programs = min(
            registers // (per_warp * self.warps),
            shared // (self.shared + reserved) if self.shared else warps,
            threads // (self.warps * lanes),
        )
        return min(programs * self.warps / warps, 1.0)


def triton_tool(name: str) -> Path | None:
    """A binary that Triton's wheel brings along, if it does."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return tool if tool.exists() else None


def _run(tool: str, *arguments: str) -> str:
    path = triton_tool(tool)
    if path is None:
        raise FileNotFoundError(f"this build of triton has no {tool}")
    command = [str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_cubin(cubin: bytes, arch: str, warps: int, dynamic_shared: int = 0) -> list[Code]:
    """The kernels of a cubin.

    Args:
        warps: per program, and dynamic_shared: bytes it is launched with; a cubin knows neither.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    bodies = dict(
        re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.DOTALL | re.MULTILINE)
    )
    codes = []
    pattern = r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, usage):
        body = bodies[name]
        codes.append(
            Code(
                kernel=name,
                arch=arch,
                warps=warps,
                registers=int(registers),
                shared=int(shared) + dynamic_shared,
                spill=int(stack) + int(local),
                local=len(re.findall(r"\b(?:LDL|STL)\b", body)),
                vector=_count(body, r"\b(?:LDG|STG|LDGSTS)\.E\.\S*128\b|\bLDGSTS\.E\.BYPASS\S*128"),
                narrow=_count(body, r"\b(?:LDG|STG|LDGSTS)\.E(?!\S*128)"),
                matrix=tuple(sorted(set(re.findall(r"\b((?:HMMA|HGMMA|UTCHMMA)\S*)", body)))),
            )
        )
    return codes


def read_amdgcn(text: str, arch: str, warps: int, shared: int) -> Code:
    """The kernel of an AMD assembly listing; ``shared``: bytes it is launched with."""

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    name = re.search(r"\.globl\s+(\S+)", text)
    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    wide = r"\b(?:global|buffer)_(?:load|store)_dwordx4\b"
    return Code(
        kernel=name.group(1) if name else "",
        arch=arch,
        warps=warps,
        registers=number("vgpr_count"),
        shared=shared,
        spill=4 * spilled + number("private_segment_fixed_size"),
        local=_count(text, r"\bscratch_(?:load|store)"),
        vector=_count(text, wide),
        narrow=_count(text, r"\b(?:global|buffer)_(?:load|store)_\w+") - _count(text, wide),
        matrix=tuple(sorted(set(re.findall(r"\b(v_mfma_\w+)", text)))),
    )


def _count(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))

"""``oprd-doctor``: a report on the installation.

The report lists the installed versions, the backends that work, the reasons why the others do not,
and the GPUs on which the kernel tests have run.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from oprd_kernels import native
from oprd_kernels._version import __version__
from oprd_kernels.backends import cuda, registry
from oprd_kernels.backends.triton import generation

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "datasets", "vllm")

TESTED_ON = Path(__file__).with_name("tested_on.json")
"""The record of GPU tests that ``bash benchmarks/on_gpu.sh --adopt`` writes: for each GPU the
versions, the commit, the date and the test results."""


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _triton(device: torch.device) -> str:
    return "interpreted" if device.type == "cpu" else f"configured as {generation(device)}"


def tested(gpus: Sequence[str]) -> list[str]:
    """Return one line for each recorded GPU test run and for each of ``gpus`` without a record."""
    records = json.loads(TESTED_ON.read_text("utf-8")) if TESTED_ON.exists() else []
    lines = [_record(record) for record in records]
    known = {record["gpu"] for record in records}
    lines += [f"not tested on {gpu}: nothing is on record" for gpu in dict.fromkeys(gpus)
              if gpu not in known]  # fmt: skip
    return lines or ["tested on no GPU: nothing is on record"]


def _record(record: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in record["tests"].items())
    sanitizer = f"; {record['sanitizer']}" if "sanitizer" in record else ""
    return (
        f"tested on {record['gpu']}, torch {record['torch']}, Triton {record['triton']}, commit "
        f"{record['commit']}, {record['date']}: {counts}{sanitizer}"
    )


def report() -> str:
    """Return the text that ``oprd-doctor`` prints."""
    lines = [f"oprd {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {package:<13} {version_of(package)}" for package in PACKAGES]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"devices: cpu{''.join(f', cuda:{i} ({name})' for i, name in enumerate(gpus))}")
    lines.append("backends:")
    problem = native.problem()
    if problem is None:
        simd = native.module().simd_name()
        lines.append(f"  cpu        live: C++, {simd}, {torch.get_num_threads()} threads")
    else:
        lines.append(f"  cpu        missing: {problem}")
    problem = cuda.installation_problem()
    if problem is None:
        runtime, driver, _ = native.module().cuda_facts()
        versions = f"CUDA {cuda.version_name(runtime)}, driver for {cuda.version_name(driver)}"
        architectures = native.module().cuda_architectures
        lines.append(f"  cuda       live: C++ for sm_{architectures}, {versions}")
    else:
        lines.append(f"  cuda       missing: {problem}")
    gpu = torch.device("cuda" if gpus else "cpu")
    problem = registry.unavailable("triton", gpu)
    lines.append(f"  triton     {f'missing: {problem}' if problem else 'live: ' + _triton(gpu)}")
    lines.append("  reference  live: plain PyTorch, any device, and float64")
    lines += ["GPU tests on record:", *(f"  {line}" for line in tested(gpus))]
    return "\n".join(lines)


def main() -> None:
    """Print the report; the entry point of ``oprd-doctor``."""
    print(report())


if __name__ == "__main__":
    main()

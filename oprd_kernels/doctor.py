"""``oprd-doctor``: the versions here, which backends are live, and why the others are not."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from oprd_kernels import backends, cuda, native
from oprd_kernels._version import __version__
from oprd_kernels.triton_backend import generation

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "datasets", "vllm")


def version_of(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _triton(device: torch.device) -> str:
    return "interpreted" if device.type == "cpu" else f"configured as {generation(device)}"


def report() -> str:
    """What ``oprd-doctor`` prints."""
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
    problem = backends.unavailable("triton", gpu)
    lines.append(f"  triton     {f'missing: {problem}' if problem else 'live: ' + _triton(gpu)}")
    lines.append("  reference  live: plain PyTorch, any device, and float64")
    return "\n".join(lines)


def main() -> None:
    """Entry point of ``oprd-doctor``."""
    print(report())


if __name__ == "__main__":
    main()

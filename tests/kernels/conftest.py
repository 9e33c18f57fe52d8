import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from oprd_kernels import backends, cuda, triton_backend

FUSED = [b for b in backends.BACKENDS if b != "reference"]

if triton_backend.INTERPRETED:
    from benchmarks import interpreter

    interpreter.install()


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config):
    """The CUDA kernels built for the host, behind the cuda backend from here on."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 builds the emulation")
    if missing := [tool for tool in ("cmake", "ninja", "c++") if not shutil.which(tool)]:
        pytest.skip(f"{' and '.join(missing)} needed to build the emulation of the CUDA kernels")
    build = pytestconfig.cache.mkdir("cuda_emulation")
    configure = [
        *("cmake", "-GNinja", "-S", ROOT, "-B", build, "-DOPRD_CUDA_EMULATION=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}/module",
    ]
    with FileLock(build / ".lock"):  # of pytest-xdist's workers, one builds
        for command in (configure, ["cmake", "--build", build]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (module,) = (build / "module").glob("_emulated*")
    os.environ["OPRD_CUDA_EMULATION"] = str(module)
    cuda.emulation.cache_clear()
    return cuda.emulation()


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend in turn; skipped, with the reason, where it can't run."""
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    if reason := backends.unavailable(request.param, torch.device("cpu")):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def compiled_backend(backend: str) -> str:
    """The backend, where the kernels themselves run: an interpreter's or emulation's memory
    and threads are not theirs."""
    if backend != "cpu":
        pytest.skip(f"{backend} kernels are emulated here: memory and threads are not theirs")
    return backend

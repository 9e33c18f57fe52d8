import pytest
import torch

from oprd_kernels import backends, triton_backend

FUSED = [b for b in backends.BACKENDS if b != "reference"]

if triton_backend.INTERPRETED:
    from benchmarks import interpreter

    interpreter.install()


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend in turn; skipped, with the reason, where it can't run."""
    if reason := backends.unavailable(request.param, torch.device("cpu")):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def compiled_backend(backend: str) -> str:
    """The backend, where the kernels themselves run: an interpreter's memory is not theirs."""
    if backend != "cpu":
        pytest.skip(f"{backend} kernels are interpreted here: their own memory can't be measured")
    return backend

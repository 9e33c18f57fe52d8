from collections import defaultdict

import pytest
import torch

from oprd_kernels.backends import registry
from oprd_kernels.backends import triton as triton_backend
from tests.kernels import emulation

FUSED = [b for b in registry.BACKENDS if b != "reference"]

if triton_backend.INTERPRETED:
    from benchmarks import interpreter

    interpreter.install()
    interpreter.small_blocks()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the Triton cases of a test that have no new value of any parameter, where the
    kernels are interpreted: that takes a hundred times as long as the other backends."""
    seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for item in items:
        call = getattr(item, "callspec", None)
        if triton_backend.INTERPRETED and call and call.params.get("backend") == "triton":
            values = {(name, repr(value)) for name, value in call.params.items()}
            known = seen[item.nodeid.partition("[")[0]]
            if values <= known:
                item.add_marker(pytest.mark.slow)
            known |= values


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config):
    """The CUDA kernels built for the host, behind the cuda backend from here on."""
    pytest.importorskip("pybind11", reason="pybind11 builds the emulation")
    if missing := emulation.missing_tools():
        pytest.skip(f"{' and '.join(missing)} needed to build the emulation of the CUDA kernels")
    module = emulation.build(pytestconfig.cache.mkdir("cuda_emulation"))
    emulation.install(module)
    return module


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend in turn; skipped, with the reason, where it can't run."""
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    if reason := registry.unavailable(request.param, torch.device("cpu")):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def compiled_backend(backend: str) -> str:
    """The backend, where the kernels themselves run: an interpreter's or emulation's memory
    and threads are not theirs."""
    if backend != "cpu":
        pytest.skip(f"{backend} kernels are emulated here: memory and threads are not theirs")
    return backend


@pytest.fixture
def zeroed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares all of ``saved``, also what lies between its parts, which nobody writes."""
    if triton_backend.INTERPRETED:
        from oprd_kernels.backends.triton import backend

        monkeypatch.setattr(backend, "new_floats", lambda shape, device: torch.zeros(shape))

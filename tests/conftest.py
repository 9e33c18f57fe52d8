import os

# Before anything imports triton: its kernels run in its interpreter where there is no GPU.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no directory is not looked up

from collections.abc import Callable

import pytest

from oprd.observability.memory import PeakMemory


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: of several processes, none is then left with a
    long one at the end (pytest-xdist's ``--no-loadscope-reorder`` keeps this order)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Measures by how many bytes the process's memory rises above its start while a call runs."""

    def measure(call: Callable[[], object]) -> int:
        with PeakMemory() as peak:
            call()
        if peak.delta is None:
            pytest.skip("this system has no high-water mark to reset (/proc/self/clear_refs)")
        return peak.delta

    return measure

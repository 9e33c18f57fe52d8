import os

# Before anything imports triton: its kernels run in its interpreter where there is no GPU.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable

import pytest

from oprd.observability.memory import PeakMemory


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

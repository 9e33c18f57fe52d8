import pytest

from oprd_kernels import backends

NATIVE = [b for b in backends.BACKENDS if b != "reference"]


@pytest.fixture(params=NATIVE)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend in turn; skipped, with the reason, where it can't run."""
    if request.param == "cpu" and (reason := backends.native_problem()):
        pytest.skip(reason)
    return request.param

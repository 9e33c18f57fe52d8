"""What can be said of the CUDA kernels' machine code without running it, and of a build."""

import re

import pytest
import torch

from benchmarks import gpu_code, gpu_cuda
from oprd_kernels import doctor, native
from oprd_kernels.backends import cuda, registry
from oprd_kernels.call import LossCall


@pytest.fixture(
    scope="module",
    params=[
        arch if arch == "sm90" else pytest.param(arch, marks=pytest.mark.exhaustive)
        for arch in gpu_cuda.ARCHITECTURES
    ],
)
def reports(request):
    try:
        return gpu_cuda.codes(architectures=[request.param])
    except gpu_code.Missing as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_every_unit_compiles(reports):
    assert {unit for unit, _ in reports} == set(gpu_cuda.UNITS)
    kernels = [r.kernel for unit, r in reports if unit == "bf16"]
    for name in ("identity_forward", "identity_backward", "tensor_forward", "projected_backward"):
        assert any(name in kernel for kernel in kernels)


@pytest.mark.slow
def test_nothing_is_spilled_or_kept_in_local_memory(reports):
    assert not [r for _, r in reports if r.spill or r.local]
    assert all(r.registers > 0 for _, r in reports)


@pytest.mark.slow
def test_vectors_are_read_and_written_16_bytes_at_a_time(reports):
    for unit, r in reports:
        if unit == "reduce" or "prepare_terms" in r.kernel:
            continue
        vectorised = gpu_cuda.is_vectorised(r)
        assert (r.vector_loads > 0) == vectorised, r
        writes_rows = "_forward" not in r.kernel or "identity" in r.kernel  # others: z, r floats
        if "projected_backward" in r.kernel and unit != "fp32" and re.search(r"\b16\b", r.kernel):
            continue  # 16 ranks of P leave registers for vectors of 8 bytes
        assert (r.vector_stores > 0) == (vectorised and writes_rows), r


@pytest.mark.slow
def test_16_bit_states_are_projected_on_tensor_cores(reports):
    for _, r in reports:
        assert bool(r.matrix) == ("tensor_forward" in r.kernel), r


@pytest.mark.slow
def test_two_blocks_of_the_projection_fit_an_sm(reports):
    for _, r in reports:
        assert 0.12 < r.occupancy <= 1, r
        if "projected" in r.kernel:
            assert r.occupancy * gpu_code.LIMITS[r.arch][3] >= 2 * r.warps, r


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_backend_says_so(monkeypatch):
    monkeypatch.setattr(cuda.BACKEND, "machine", None)
    cuda.installation_problem.cache_clear()
    assert "NVIDIA GPU, not on cpu" in registry.unavailable("cuda", torch.device("cpu"))
    if native.cuda_problem():
        pytest.skip("the native module here has no CUDA kernels")
    assert "driver" in registry.unavailable("cuda", torch.device("cuda"))
    assert "cuda       missing: " in doctor.report()
    call, out = LossCall(torch.zeros(1, 4), torch.zeros(1, 4)), torch.zeros(16)
    with pytest.raises(RuntimeError, match="oprd CUDA: cudaGetDevice: "):
        native.module().cuda_forward((call,), None, out, out, None, 0, 0)


def test_a_build_without_cuda_is_explained(monkeypatch):
    class Native:
        """As it is built without nvcc."""

    monkeypatch.setattr(native, "_module", Native())
    monkeypatch.setattr(native, "build_report", lambda: {"native": None, "cuda": "no nvcc"})
    cuda.installation_problem.cache_clear()
    problem = registry.unavailable("cuda", torch.device("cuda"))
    cuda.installation_problem.cache_clear()
    assert "the CUDA kernels are not installed (no nvcc). Install the CUDA toolkit" in problem

"""What the Triton kernels compile to for GPUs that are not here (`benchmarks.gpu_static`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.gpu_code import Missing, find_cuobjdump

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
PRODUCTS = (
    "projected_forward", "project", "half_backward", "tiled_backward", "projector_gradient",
)  # fmt: skip

KERNELS = {
    "identity_forward", "identity_forward_wide", "identity_backward", "prepare",
    "projected_forward", "project", "compare", "half_backward", "tiled_backward",
    "projector_gradient", "reduce_rows",
}  # fmt: skip


def run(module, *arguments):
    """What a module prints; in a process of its own, as this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compile_table(arch):
    """Every kernel of the table."""
    options = ("--json_lines", "true", "--backend", "[triton]", "--arch", f"[{arch}]")
    return [json.loads(line) for line in run("benchmarks.gpu_static", *options).splitlines()]


@pytest.fixture(
    scope="module",
    params=[pytest.param(arch, marks=pytest.mark.exhaustive) for arch in TARGETS],
)
def kernels(request):
    try:
        find_cuobjdump()
    except Missing as reason:
        if request.param != "gfx942":
            pytest.skip(str(reason))
    return compile_table(request.param)


@pytest.mark.slow
def test_nothing_spills(kernels):
    spilled = [k for k in kernels if k["spill"] or k["local"]]
    assert not spilled
    assert all(k["registers"] > 0 for k in kernels)  # the report was read


SHARED = {"sm80": 101376, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
"""Bytes of shared memory that a program may have; sm80: the least of that generation (sm_86)."""


@pytest.mark.slow
def test_shared_memory_suffices(kernels):
    greedy = [k for k in kernels if k["shared"] > SHARED[k["arch"]]]
    assert not greedy


@pytest.mark.slow
def test_activations_move_in_128_bits(kernels):
    """Every row-wise load and store: what is narrower are indices, weights, statistics and dz."""
    for k in kernels:
        if k["kernel"].startswith("identity_"):
            # Wide: three passes over both tensors and their stores; statistics are nine accesses.
            assert k["vector_loads"] >= 2, k
            assert k["narrow"] <= 13, k
        elif k["kernel"] in PRODUCTS:
            # The tiled backward reads no activations unless it adds to them.
            assert k["vector_loads"] >= (1 if k["kernel"] == "tiled_backward" else 2), k


@pytest.mark.slow
def test_products_use_tensor_cores(kernels):
    names = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
    seen = 0
    for k in kernels:
        if k["kernel"] in PRODUCTS:
            assert any(m.startswith(names[k["arch"]]) for m in k["matrix"]), k
            seen += 1
    assert seen >= 20


@pytest.mark.slow
def test_every_kernel_of_the_backend_is_in_the_table(kernels):
    assert {k["kernel"] for k in kernels} == KERNELS


@pytest.mark.slow
def test_every_option_compiles():
    assert int(run("tests.kernels.triton_options")) > 100


def test_the_published_table_is_of_these_kernels():
    """benchmarks/results/gpu_static.md, which the documentation points to."""
    table = (Path(__file__).parents[2] / "benchmarks/results/gpu_static.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| triton")]
    assert {row[1] for row in rows} == KERNELS

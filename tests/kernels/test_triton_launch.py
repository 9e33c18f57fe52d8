"""Kernels launched directly (`oprd_kernels.backends.triton.launch`) get what Triton's own launcher
gives them, on a stubbed CUDA driver (`tests.kernels.stub_driver`)."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels import stub_driver

KERNELS = {
    "identity_forward", "identity_forward_wide", "identity_backward", "prepare",
    "projected_forward", "project", "compare", "half_backward", "tiled_backward",
    "projector_gradient", "reduce_rows",
}  # fmt: skip


pytestmark = pytest.mark.slow  # all kernels are compiled


@pytest.fixture(scope="module")
def every_case():
    """What each case launches, how it was launched; from a process that does not interpret."""
    if reason := stub_driver.missing():
        pytest.skip(reason)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-m", "tests.kernels.stub_driver.launches"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def cases(every_case):
    """Without those that do not fit the chip, of which one test tells."""
    return [case for case in every_case if "error" not in case]


def test_every_kernel_fits_an_h200(every_case):
    """Its shared memory, with this version of Triton."""
    assert not {case["case"]: case["error"] for case in every_case if "error" in case}


def goes_by_triton(case):
    """Whether an argument makes it another kernel than the one for aligned, 32-bit arguments."""
    return case["case"].startswith(("misaligned", "large"))


def test_every_kernel_is_launched_both_ways(cases):
    def names(way, by_triton):
        return {
            launch["name"]
            for case in cases
            if case[way]["by_triton"] == by_triton
            for launch in case[way]["launches"]
        }

    assert names("second", 0) == KERNELS
    assert {x["name"] for case in cases for x in case["watched"]["launches"]} == KERNELS


@pytest.mark.parametrize("way", ["first", "second", "again"])
def test_the_driver_gets_what_triton_gives_it(cases, way):
    """Function, grid, block, shared memory, stream and every parameter."""
    for case in cases:
        assert case[way]["launches"] == case["watched"]["launches"], case["case"]


@pytest.mark.parametrize("way", ["second", "again"])
def test_a_repeated_call_is_launched_directly(cases, way):
    """Unless a pointer is misaligned or a scalar too large for the kernel that is ready."""
    for case in cases:
        launches = len(case[way]["launches"])
        if goes_by_triton(case):
            assert 0 < case[way]["by_triton"] <= launches, case["case"]
        else:
            assert case[way]["by_triton"] == 0, case["case"]
            assert launches > 0, case["case"]


def test_watched_launches_are_tritons(cases):
    """A profiler's hook is told of every launch."""
    for case in cases:
        launches = len(case["watched"]["launches"])
        assert case["watched"]["by_triton"] == launches, case["case"]
        assert case["seen"] == launches, case["case"]


def test_no_kernel_is_another_ones(cases):
    """Misaligned pointers, large scalars, other dtypes and None have functions of their own."""
    functions = {
        case["case"]: [launch["function"] for launch in case["again"]["launches"]] for case in cases
    }

    def first(name):
        return functions[name][0]

    for group in (
        [
            "identity", "misaligned, identity", "identity, weights", "identity, rows",
            "identity, teacher_rows", "identity, both rows", "identity, float32",
            "identity, float16", "identity, float32 teacher", "identity, float32 student",
            "identity, kind", "in place", "identity, narrower", "layers",
        ],
        ["in place", "in place, float16"],
        ["just not large stride", "large stride"],
        ["few rows", "few rows, mean", "few rows, projected teacher", "few rows, float32"],
        [
            "identity backward", "identity backward, accumulate", "identity backward, weights",
            "identity backward, float32 gradient", "misaligned gradient", "layers backward",
        ],
        ["Bridge backward, accumulate False", "misaligned Bridge backward"],
        ["projector", "misaligned projector", "projector, rows", "projector, float32"],
    ):  # fmt: skip
        found = [first(name) for name in group]
        assert len(set(found)) == len(found), dict(zip(group, found, strict=True))
    assert functions["identity, odd weights"] == functions["identity, weights"]
    assert functions["identity, fewer rows"] == functions["identity, both rows"]

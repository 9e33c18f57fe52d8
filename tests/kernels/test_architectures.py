"""Which GPU architectures the CUDA kernels are built for: csrc/cuda/architectures.cmake."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oprd_kernels.backends import cuda

SCRIPT = Path(__file__).parents[2] / "csrc/cuda/architectures.cmake"
NVCC_13 = "sm_75\nsm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_103\nsm_120\n"

pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake here")


def choose(tmp_path, *options, code=NVCC_13, smi=None, **environment):
    """What the function gives, as "80,90", with the warning if any; or the error message."""
    main = tmp_path / "main.cmake"
    main.write_text(
        f'include({SCRIPT})\noprd_choose_architectures("{code}" CHOSEN)\n'
        'string(REPLACE ";" "," CHOSEN "${CHOSEN}")\nmessage("chosen ${CHOSEN}.")\n'
    )
    path = os.environ["PATH"]
    if smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{path}"
    clean = {k: v for k, v in os.environ.items() if "ARCHITECTURES" not in k}
    done = subprocess.run(
        ["cmake", *options, "-P", str(main)],
        capture_output=True,
        text=True,
        env=clean | {"PATH": path} | environment,
    )
    message = " ".join(done.stderr.split())
    if done.returncode:
        return message
    warning, chosen = re.fullmatch(r"(.*?) ?chosen ([\d,]*)\.", message).groups()
    return (chosen, warning) if warning else chosen


def test_without_a_wish_those_the_nvcc_knows(tmp_path):
    assert choose(tmp_path) == "80,90,100"
    assert choose(tmp_path, code="sm_80\nsm_90") == "80,90"
    assert choose(tmp_path, code="sm_70\n") == ""


@pytest.mark.parametrize("name", ["OPRD_CUDA_ARCHITECTURES", "CMAKE_CUDA_ARCHITECTURES"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        *[("90", "90"), ("90;100", "90,100"), ("100,80", "80,100"), ("80, 90;", "80,90")],
        *[("sm_90", "90"), ("90-real", "90"), ("9.0", "90"), ("8.9;10.0", "89,100")],
        *[("90a", "90"), ("9.0a", "90"), ("100f;100a-real", "100"), ("8.0+PTX", "80")],
        *[("all", "80,90,100"), ("all-major", "80,90,100"), ("all;86", "80,86,90,100")],
    ],
)
def test_an_option_or_a_variable_is_honoured(tmp_path, name, asked, expected):
    assert choose(tmp_path, f"-D{name}={asked}") == expected
    assert choose(tmp_path, **{name: asked}) == expected


def test_an_option_goes_before_a_variable(tmp_path):
    got = choose(tmp_path, "-DCMAKE_CUDA_ARCHITECTURES=90", OPRD_CUDA_ARCHITECTURES="80")
    assert got == "90"


def test_native_is_what_nvidia_smi_names(tmp_path):
    here = {"smi": "printf '9.0\\n9.0\\n8.0\\n'"}
    assert choose(tmp_path, OPRD_CUDA_ARCHITECTURES="native", **here) == "80,90"
    without = choose(tmp_path, OPRD_CUDA_ARCHITECTURES="native", smi="exit 9")
    assert 'the architecture "native" is asked for, and nvidia-smi names no GPU' in without


UNKNOWN = 'does not build for the architecture "{}"'
UNREADABLE = 'the architecture "{}" can\'t be read: write it like "90" or "9.0"'
WRONG = [("95", UNKNOWN), ("9.5", UNKNOWN), ("hopper", UNREADABLE), ("9", UNREADABLE)]
WRONG += [("90b", UNREADABLE), ("9.0.0", UNREADABLE)]


@pytest.mark.parametrize(("asked", "problem"), WRONG)
def test_what_cant_be_built_is_an_error(tmp_path, asked, problem):
    assert problem.format(asked) in choose(tmp_path, OPRD_CUDA_ARCHITECTURES=asked)
    assert problem.format(asked) in choose(tmp_path, f"-DCMAKE_CUDA_ARCHITECTURES=80;{asked}")


@pytest.mark.parametrize(("asked", "problem"), WRONG)
def test_but_the_general_variable_is_ignored_with_a_warning(tmp_path, asked, problem):
    chosen, warning = choose(tmp_path, CMAKE_CUDA_ARCHITECTURES=f"80;{asked}")
    assert chosen == "80,90,100"
    assert "CMAKE_CUDA_ARCHITECTURES in the environment is ignored" in warning
    assert problem.format(asked) in warning
    assert choose(tmp_path, OPRD_CUDA_ARCHITECTURES="90", CMAKE_CUDA_ARCHITECTURES=asked) == "90"


@pytest.mark.parametrize("built_for", ["90", "90a", "9.0", "100f,90a", "90,100"])
def test_of_a_build_only_the_number_counts(monkeypatch, built_for):
    device = torch.device("cuda")
    monkeypatch.setattr(cuda.native, "_module", SimpleNamespace(cuda_architectures=built_for))
    for capability, fits in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        problem = cuda._capability_problem.__wrapped__(device)
        assert (problem is None) == fits
        assert fits or "are built for 9.0 and later" in problem

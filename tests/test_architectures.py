"""Which GPU architectures the CUDA kernels are built for: csrc/cuda/architectures.cmake."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "csrc/cuda/architectures.cmake"
NVCC_13 = "sm_75\nsm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_103\nsm_120\n"

pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake here")


def choose(tmp_path, *options, code=NVCC_13, smi=None, **environment):
    """What the function gives, as "80,90", or the error message."""
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
    if done.returncode:
        return " ".join(done.stderr.split())
    return done.stderr.strip().removeprefix("chosen ").removesuffix(".")


def test_without_a_wish_those_the_nvcc_knows(tmp_path):
    assert choose(tmp_path) == "80,90,100"
    assert choose(tmp_path, code="sm_80\nsm_90") == "80,90"
    assert choose(tmp_path, code="sm_70\n") == ""


@pytest.mark.parametrize("name", ["OPRD_CUDA_ARCHITECTURES", "CMAKE_CUDA_ARCHITECTURES"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [("90", "90"), ("90;100", "90,100"), ("100,80", "80,100"), ("sm_90", "90"), ("90-real", "90")],
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


@pytest.mark.parametrize("asked", ["95", "9.0", "hopper", "9"])
def test_an_architecture_that_nvcc_lacks_is_an_error(tmp_path, asked):
    message = choose(tmp_path, OPRD_CUDA_ARCHITECTURES=asked)
    assert f'does not build for the architecture "{asked}"' in message

"""Builds the native kernels with CMake; everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs all the same, in pure Python, and says at import what
is missing. ``OPRD_REQUIRE_NATIVE=1`` makes a failed native build an error instead. Without an nvcc
that works, the native module is built without the CUDA kernels; `oprd-doctor` says why.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class NativeBuildError(Exception):
    """The native module could not be built; the message is one line for the user."""


def build_native(output_dir: Path, build_dir: Path) -> str | None:
    """Build ``_native`` into ``output_dir``, if need be without CUDA; why that, or None."""
    try:
        run_cmake(output_dir, build_dir)
    except NativeBuildError as error:
        fresh(build_dir)
        run_cmake(output_dir, build_dir, "-DOPRD_CUDA=OFF")
        return f"their build failed: {error}"
    return (build_dir / "cuda_problem.txt").read_text() or None


def fresh(build_dir: Path) -> None:
    """Make an empty directory: a moved or isolated build leaves stale paths."""
    shutil.rmtree(build_dir, ignore_errors=True)
    build_dir.mkdir(parents=True)


def run_cmake(output_dir: Path, build_dir: Path, *options: str) -> None:
    """Configure and build ``_native`` into ``output_dir``."""
    import pybind11

    cmake = shutil.which("cmake")
    if cmake is None:
        raise NativeBuildError("cmake was not found on PATH")
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(build_dir)),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
    ]
    if ninja := shutil.which("ninja"):
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [*os.environ.get("CMAKE_ARGS", "").split(), *options]
    for command in (configure, [cmake, "--build", str(build_dir), "--parallel"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stderr.write(result.stdout + result.stderr)
        if result.returncode != 0:
            raise NativeBuildError(first_error(result.stdout + result.stderr))


def first_error(log: str) -> str:
    """The line of a build log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No CMAKE_CXX_COMPILER could be found" in line for line in lines):
        return "no C++ compiler was found"
    for pattern in (r"\b(error|fatal)\s*: ", r"CMake Error", r"error"):
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE):
                return line
    return lines[-1] if lines else "the build printed nothing"


class CMakeBuild(build_ext):
    """Builds with CMake and records in ``_build_report.json`` whether that worked."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        build_dir = Path(self.build_temp).resolve() / "cmake"
        fresh(build_dir)
        problem = cuda_problem = None
        try:
            cuda_problem = build_native(module.parent, build_dir)
        except NativeBuildError as error:
            problem = str(error)
            if os.environ.get("OPRD_REQUIRE_NATIVE") == "1":
                raise
            module.unlink(missing_ok=True)  # an older build must not pass for this one
            print(f"oprd: installing without native kernels: {problem}", file=sys.stderr)
        report = module.with_name("_build_report.json")
        report.write_text(json.dumps({"native": problem, "cuda": cuda_problem}) + "\n")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Editable installs: bring the module and the report, as far as they exist, to the tree."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            package = ".".join(ext.name.split(".")[:-1])
            target = Path(build_py.get_package_dir(package))
            built = Path(self.build_lib) / package.replace(".", "/")
            name = Path(self.get_ext_filename(ext.name)).name
            (target / name).unlink(missing_ok=True)
            for file in (name, "_build_report.json"):
                if (built / file).exists():
                    shutil.copyfile(built / file, target / file)


setup(
    ext_modules=[Extension("oprd_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

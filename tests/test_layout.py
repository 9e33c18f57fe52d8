"""What the tree promises: imports point downwards, in one direction, everywhere."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    "demo", "cli", "paper", "report", "benchmark", "training", "evaluation", "memory_plan",
    "distill", "bridge", "engines",
    "checkpoint", "data", "tokenizers", "models", "observability", "distributed", "config",
    "hub", "output_paths", "atomic_files", "errors",
)  # fmt: skip
"""Parts of `oprd`, the highest first: each imports from itself and from those after it alone."""


def modules(package):
    """By dotted name, the files of a package."""
    names = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports(file, known):
    """The modules of ``known`` that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


@pytest.mark.parametrize("package", ["oprd", "oprd_kernels"])
def test_no_module_imports_itself_in_the_end(package):
    known = modules(package)
    graph = {name: imports(file, known) - {name} for name, file in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_imports_point_downwards():
    known = modules("oprd")
    for name, file in known.items():
        if name == "oprd":
            continue
        own = LAYERS.index(name.split(".")[1])
        for other in imports(file, known) - {"oprd"}:
            assert LAYERS.index(other.split(".")[1]) >= own, f"{name} imports {other}"


def test_kernels_stand_alone():
    known = modules("oprd")
    for name, file in modules("oprd_kernels").items():
        assert not imports(file, known), name

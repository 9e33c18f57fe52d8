"""The demo's configuration, ``demo.yaml`` in the package."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import yaml

from oprd.config.io import from_values
from oprd.config.train import TrainConfig

RECIPE = Path(__file__).parents[1] / "demo" / "demo.yaml"


@functools.cache
def demo_values() -> dict[str, Any]:
    """Return the demo's options as plain values."""
    return yaml.safe_load(RECIPE.read_text())


@functools.cache
def _demo() -> TrainConfig:
    return from_values(demo_values())


def demo_config() -> TrainConfig:
    """Return the demo's configuration: a student of 1.06 M parameters learns addition."""
    return copy.deepcopy(_demo())


def is_demo(path: str) -> bool:
    """Return whether a path is one of the demo's files."""
    return path.startswith("demo:")

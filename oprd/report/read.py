"""Tolerant reading of a run's files.

A run may still be writing, have crashed in the middle of a line, or be of another version of oprd.
Nothing here raises for that: what can't be read is left out, and a note says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def json_lines(file: Path, notes: list[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file in order.

    Args:
        notes: receives a message if lines could not be read, or if ``limit`` ended the reading.
        limit: number of bytes after which reading ends, at the end of a line. None: none.
    """
    return (value for _, value in placed_lines(file, notes, limit))


def placed_lines(
    file: Path, notes: list[str], limit: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place in the file in bytes, object). The arguments are `json_lines`'s."""
    bad: list[int] = []
    cut, read, number = False, 0, 0
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if limit is not None and read > limit:
                    notes.append(
                        f"{file.name}: only the first {read / 2**20:.0f} MiB are read for display"
                    )
                    break
                place, read = read, read + len(raw)
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw.decode(errors="replace"))
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    yield place, value
                elif raw.endswith(b"\n"):
                    bad.append(number)
                else:
                    cut = True
    except OSError as error:
        notes.append(f"{file.name} could not be read: {error.strerror or error}")
    if bad:
        notes.append(
            f"{file.name}: {len(bad)} of {number:,} lines could not be read, the first is line "
            f"{bad[0]:,}"
        )
    if cut:
        notes.append(
            f"{file.name}: its last line, {number:,}, is cut: the run is writing it, or was stopped"
        )


def document(file: Path, notes: list[str]) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file; an empty one if there is none, with a note."""
    if not file.exists():
        return {}
    try:
        text = file.read_text(errors="replace")
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{file.name} could not be read: {str(error).splitlines()[0]}")
        return {}
    if isinstance(value, dict):
        return value
    notes.append(f"{file.name} holds no mapping of names to values, so it is left out")
    return {}


def number(value: Any) -> float:
    """Return a number as a float; NaN for anything else, and beyond 1e100, where sums overflow."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if abs(value) < 1e100 else math.nan


def mapping(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one: ``{"optim.lr": 1e-5}``. Empty mappings are kept as ``{}``."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return out

"""Checkpoint directories: naming, integrity checks, completion and deletion."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd.atomic_files import UNFINISHED, sync, write_json

FORMAT = 1
DOCUMENT = "checkpoint.json"
BEST = "best.json"
NAME = re.compile(r"step_(\d{8,})")
CHUNK = 1 << 22

Digests = dict[str, list[int]]
"""Size in bytes and CRC-32 of each file, by path relative to the checkpoint."""


class Torn(ValueError):
    """A checkpoint is incomplete or damaged; the message says how."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are present with the right sizes.

    Attributes:
        path: the checkpoint's directory.
        document: the content of ``checkpoint.json``.
    """

    path: Path
    document: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps made."""
        return self.document["step"]


def step_name(step: int) -> str:
    """Return the name of the checkpoint directory for a step."""
    return f"step_{step:08d}"


def read(path: Path) -> Checkpoint:
    """Read a checkpoint's document and check the sizes of its files.

    Raises:
        Torn: if a file is missing or truncated, or if the format is not `FORMAT`.
    """
    file = path / DOCUMENT
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Torn(f"no {DOCUMENT}: the checkpoint was not finished") from None
    except (OSError, ValueError) as error:
        raise Torn(f"{DOCUMENT} can't be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        given = document.get("format") if isinstance(document, dict) else None
        raise Torn(f"it has format {given}, but this version reads format {FORMAT}")
    for name, (size, _) in document["files"].items():
        try:
            actual = (path / name).stat().st_size
        except OSError:
            raise Torn(f"{name} is missing") from None
        if actual != size:
            raise Torn(f"{name} has {actual} bytes of {size}")
    return Checkpoint(path, document)


def verify(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare the contents of the named files with their recorded checksums.

    Raises:
        Torn: if a file differs; the message names the first one.
    """
    files = checkpoint.document["files"]
    for name in names:
        if crc32(checkpoint.path / name) != files[name][1]:
            raise Torn(f"{name} has changed since it was written (its checksum differs)")


def find(directory: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """Find the checkpoints in a ``checkpoints`` directory.

    Returns:
        The checkpoints that `read` accepts, newest first, and for each other one the reason why
        `read` rejects it.
    """
    good, torn = [], {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if not NAME.fullmatch(path.name) or not path.is_dir():
            continue
        try:
            good.append(read(path))
        except Torn as error:
            torn[path] = str(error)
    return sorted(good, key=lambda c: c.step, reverse=True), torn


def newest(directory: Path) -> Checkpoint | None:
    """Return the newest checkpoint that `read` accepts, or None."""
    return next(iter(find(directory)[0]), None)


def read_best(directory: Path) -> dict[str, Any] | None:
    """Return metric, value and step of the best checkpoint; None if that checkpoint is gone."""
    try:
        best = json.loads((directory / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best if (directory / step_name(best["step"])).is_dir() else None


def crc32(file: Path) -> int:
    """Compute the CRC-32 of a file's contents."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def digests(directory: Path, files: Iterable[Path]) -> Digests:
    """Compute the size and checksum of each file."""
    return {str(f.relative_to(directory)): [f.stat().st_size, crc32(f)] for f in files}


def complete(unfinished: Path, path: Path, document: Mapping[str, Any]) -> None:
    """Write a checkpoint's document, then give the checkpoint its final name.

    Call this once all other files are on the disk.
    """
    write_json(unfinished / DOCUMENT, document)
    if path.exists():  # damaged, or left by an earlier start of this run
        remove(path)
    unfinished.rename(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint.

    The directory is renamed first, so that a partly deleted checkpoint is not taken for one.
    """
    going = path.with_name(f"{path.name}.going{UNFINISHED}")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)


def remove_unfinished(directory: Path) -> None:
    """Delete the leftovers of a crash during a write or a deletion."""
    for path in directory.glob(f"*{UNFINISHED}") if directory.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def prune(directory: Path, keep_last: int | None, also: int | None) -> None:
    """Delete all checkpoints except the newest ``keep_last`` and the one of step ``also``."""
    if keep_last is None:
        return
    steps = sorted((c.step for c in find(directory)[0]), reverse=True)
    for step in steps[keep_last:]:
        if step != also:
            remove(directory / step_name(step))


def set_aside(path: Path, label: str) -> Path:
    """Rename a file or directory to an unused ``<name>.<label>-<n>``; return the new path."""
    number = 1
    while (other := path.with_name(f"{path.name}.{label}-{number}")).exists():
        number += 1
    return path.rename(other)

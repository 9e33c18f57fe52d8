"""Checkpoints as directories: their names, whether they are whole, which are kept."""

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
"""By path below the checkpoint: size in bytes and CRC-32."""


class Torn(ValueError):
    """A checkpoint that is not whole; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """One that looks whole.

    Attributes:
        path: its directory.
        document: what is in ``checkpoint.json``.
    """

    path: Path
    document: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.document["step"]


def step_name(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step_{step:08d}"


def read(path: Path) -> Checkpoint:
    """A checkpoint, after a look at the sizes of its files.

    Raises:
        Torn: if something is missing, cut off or of another format.
    """
    file = path / DOCUMENT
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Torn(f"no {DOCUMENT}: it was not finished") from None
    except (OSError, ValueError) as error:
        raise Torn(f"{DOCUMENT} can't be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        given = document.get("format") if isinstance(document, dict) else None
        raise Torn(f"it has format {given}, this version reads {FORMAT}")
    for name, (size, _) in document["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise Torn(f"{name} is missing") from None
        if found != size:
            raise Torn(f"{name} has {found} bytes of {size}")
    return Checkpoint(path, document)


def verify(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare the contents of some of its files with their checksums.

    Raises:
        Torn: naming the first file that differs.
    """
    files = checkpoint.document["files"]
    for name in names:
        if crc32(checkpoint.path / name) != files[name][1]:
            raise Torn(f"{name} has changed since it was written (its checksum differs)")


def find(directory: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints of a ``checkpoints`` directory that look whole, newest first; and what is
    wrong with the others."""
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
    """The newest that looks whole."""
    return next(iter(find(directory)[0]), None)


def read_best(directory: Path) -> dict[str, Any] | None:
    """The metric, its value and the step of the best checkpoint, if that is still there."""
    try:
        best = json.loads((directory / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best if (directory / step_name(best["step"])).is_dir() else None


def crc32(file: Path) -> int:
    """Of a file's contents."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def digests(directory: Path, files: Iterable[Path]) -> Digests:
    """Size and checksum of each file."""
    return {str(f.relative_to(directory)): [f.stat().st_size, crc32(f)] for f in files}


def complete(unfinished: Path, path: Path, document: Mapping[str, Any]) -> None:
    """Give a checkpoint its document and its name, in this order, when all else is on the disk."""
    write_json(unfinished / DOCUMENT, document)
    if path.exists():  # a torn one, or of a run that has been begun again
        remove(path)
    unfinished.rename(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint. It loses its name first: half of one must not look like one."""
    going = path.with_name(f"{path.name}.going{UNFINISHED}")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)


def remove_unfinished(directory: Path) -> None:
    """Delete what a crash while writing or deleting has left."""
    for path in directory.glob(f"*{UNFINISHED}") if directory.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def prune(directory: Path, keep_last: int | None, also: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and that of step ``also``."""
    if keep_last is None:
        return
    steps = sorted((c.step for c in find(directory)[0]), reverse=True)
    for step in steps[keep_last:]:
        if step != also:
            remove(directory / step_name(step))


def set_aside(path: Path, label: str) -> Path:
    """Rename a file or directory to ``<name>.<label>-<n>``, a name not in use; returns that."""
    number = 1
    while (other := path.with_name(f"{path.name}.{label}-{number}")).exists():
        number += 1
    return path.rename(other)

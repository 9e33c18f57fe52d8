"""Atomic file writes: a crash leaves a file on disk either complete or absent."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

UNFINISHED = ".tmp"


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk (``fsync``)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Flush a directory and everything below it to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file atomically: a crash leaves it complete or absent."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with unfinished.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(file)
    sync(file.parent)


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, atomically (see `write_whole`)."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


def write_figure(file: Path, figure: Any, **options: Any) -> None:
    """Write a Matplotlib figure in the format of the file's suffix, atomically.

    Args:
        options: arguments of the figure's ``savefig``.
    """
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix[1:], **options)
    write_whole(file, content.getvalue())

"""Files that are on the disk as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

UNFINISHED = ".tmp"


def sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """`sync` everything below a directory, and the directory."""
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is whole or not there, whatever happens."""
    unfinished = file.with_name(file.name + UNFINISHED)
    with unfinished.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(file)
    sync(file.parent)


def write_json(file: Path, value: Any) -> None:
    """`write_whole` of a value."""
    write_whole(file, json.dumps(value, indent=1) + "\n")

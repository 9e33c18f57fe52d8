"""Checks that results can be written, before the work whose results they are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from oprd.errors import ConfigError


def check_writable(path: str | Path, what: str = "") -> None:
    """Check that a file or directory can be made at ``path``, with the directories above it.

    Args:
        what: the option that names it, for the message.

    Raises:
        ConfigError: if the nearest thing above it that exists isn't a writable directory.
    """
    named = f"{what} {path}".strip()
    parent = Path(path).absolute()
    while not os.path.exists(parent):  # unlike Path.exists, False without permission to look
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"{named}: {parent} is a file, not a directory")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{named} can't be written: no permission in {parent}")


def check_output_dir(path: str | Path, files: Iterable[str] = (), what: str = "output_dir") -> None:
    """Check that files can be written to a directory, which need not exist yet.

    Args:
        files: names of the files; they must not exist yet.
        what: the option that names the directory, for the message.

    Raises:
        ConfigError: if the directory can't be written, or a file would be lost.
    """
    check_writable(path, what)
    for name in files:
        if (file := Path(path, name)).exists():
            raise ConfigError(f"{file} exists and would be lost: choose another {what}")

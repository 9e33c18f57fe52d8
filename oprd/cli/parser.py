"""The argument parser of all commands, and their common error handling."""

from __future__ import annotations

import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser

from oprd.config.io import explained, option_names
from oprd.errors import ConfigError
from oprd.observability.console import shown


class Parser(ArgumentParser):
    """An argument parser that suggests the nearest option for an unknown one."""

    def error(self, message: str, ex: Exception | None = None):
        """Print the message and exit with code 2."""
        sys.stderr.write(f"{self.prog}: error: {explained(message, option_names(self))}\n")
        sys.exit(2)


def run_command(prog: str, command: Callable[[], object], interrupted: str = "interrupted") -> None:
    """Run a command. Exit with code 2 after a `ConfigError` and 130 after Ctrl-C, with a message.

    Args:
        prog: name of the program, for the messages.
        interrupted: the message after Ctrl-C.
    """
    try:
        with shown():
            command()
    except ConfigError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: {interrupted}\n")
        sys.exit(130)

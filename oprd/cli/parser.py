"""The parser of all commands, and what they have in common when they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser

from oprd.config.io import explained
from oprd.errors import ConfigError
from oprd.observability.console import shown


class Parser(ArgumentParser):
    """Names the nearest option where an unknown one is given."""

    def error(self, message: str, ex: Exception | None = None):
        """End the program (exit code 2) with the message, on one line where it can be."""
        sys.stderr.write(f"{self.prog}: error: {explained(message, self.option_names())}\n")
        sys.exit(2)

    def option_names(self) -> list[str]:
        """Return every option, dotted."""
        return [action.dest for action in self._actions if action.dest != "help"]


def run_command(prog: str, command: Callable[[], object], interrupted: str = "interrupted") -> None:
    """Run a command; exit with 2 for a wrong configuration and 130 for Ctrl-C, saying so.

    Args:
        interrupted: what Ctrl-C leaves the user with.
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

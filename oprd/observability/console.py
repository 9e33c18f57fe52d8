"""Where the records of the ``oprd`` loggers are shown.

Modules log with ``logging.getLogger(__name__)``. While `shown` is open, rank 0 writes records to
stdout, above a progress bar if there is one, and the other ranks write warnings to stderr.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from oprd import distributed

LOGGER = logging.getLogger("oprd")

console = Console(highlight=False, soft_wrap=True)
"""Standard output; what else is shown there has to go through it too."""


class ConsoleHandler(logging.Handler):
    """Prints a record's message, behind its level if that is a warning or worse."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            is_warning = record.levelno >= logging.WARNING
            prefix = f"{record.levelname.lower()}: " if is_warning else ""
            if distributed.rank() == 0:
                console.print(prefix + self.format(record), markup=False)
            elif is_warning:
                print(prefix + self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextmanager
def shown() -> Iterator[None]:
    """Show records of level INFO and above while open; inside another `shown`, do nothing."""
    if any(isinstance(handler, ConsoleHandler) for handler in LOGGER.handlers):
        yield
        return
    handler, level = ConsoleHandler(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)

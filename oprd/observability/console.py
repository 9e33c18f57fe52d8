"""Where the records of the ``oprd`` loggers are shown.

Modules log with ``logging.getLogger(__name__)``. While `shown` is open, rank 0 writes records to
stdout, above a progress bar if there is one. The other ranks are silent, but for records of events
that happen on one rank alone: those have ``extra=ANY_RANK`` and go to stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from oprd import distributed

LOGGER = logging.getLogger("oprd")
ANY_RANK = {"any_rank": True}

console = Console(highlight=False, soft_wrap=True)
"""Standard output; what else is shown there has to go through it too."""


class ConsoleHandler(logging.Handler):
    """Prints a record's message, behind its level if that is a warning or worse."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, if it is this rank's to print."""
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            rank = _rank()
            if rank == 0:
                console.print(text, markup=False)
            elif getattr(record, "any_rank", False):
                print(f"rank {rank}: {text}", file=sys.stderr)
        except Exception:
            self.handleError(record)


def _rank() -> int:
    """Return this process's rank, which torchrun tells before the process group exists."""
    return distributed.rank() if distributed.joined() else int(os.environ.get("RANK", "0"))


@contextmanager
def shown() -> Iterator[None]:
    """Show records of level INFO and above while open; inside another `shown`, do nothing.

    The root logger's handlers do not see them then: add a handler to the ``oprd`` logger for that.
    """
    if any(isinstance(handler, ConsoleHandler) for handler in LOGGER.handlers):
        yield
        return
    handler, level, propagate = ConsoleHandler(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level or logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate

"""Handling of Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0
"""Seconds within which a second SIGINT counts as the same Ctrl-C: a terminal sends it to every
process, and torchrun forwards it to the ranks as well."""


class Interrupted(KeyboardInterrupt):
    """Raised by a program that a signal ended after it had put its files in order.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interrupt:
    """A request by signal to end the run.

    The first request interrupts at once, except while weights change: then the step is finished
    first. A second Ctrl-C always interrupts at once. Repeated SIGTERMs are ignored.

    Attributes:
        signum: the signal that asked to end the run; None before any.
        aborted: a second Ctrl-C interrupted the run, so weights may be half updated.
    """

    def __init__(self, at_once: bool = True) -> None:
        """
        Args:
            at_once: if False, only a second Ctrl-C interrupts, since several ranks must end after
                the same step.
        """
        self.signum: int | None = None
        self.aborted = False
        self._at_once, self._deferring, self._since = at_once, False, 0.0

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Handle the signals inside the block. Does nothing outside the main thread."""
        try:
            previous = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay the first request until the block ends."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._at_once and self.signum is not None:
            raise KeyboardInterrupt

    def _on_signal(self, signum: int, _frame: object) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            if self._at_once and not self._deferring:
                raise KeyboardInterrupt
        elif signum == signal.SIGINT and time.monotonic() - self._since > SAME_REQUEST:
            self.aborted = True
            raise KeyboardInterrupt

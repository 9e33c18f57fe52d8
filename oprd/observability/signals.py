"""Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 1.0
"""Seconds within which a second Ctrl-C is the first one: a terminal sends it to every process, and
torchrun passes it on to the ranks besides."""


class Interrupt:
    """A request to end: at once, except while weights change, when the step is finished first.

    A second Ctrl-C is never held back. SIGTERM may come as often as a scheduler likes.

    Attributes:
        signum: the signal that asked to end the run; None so far.
        aborted: by a second Ctrl-C: weights may be half changed.
    """

    def __init__(self, at_once: bool = True) -> None:
        """
        Args:
            at_once: if not, no request but a second Ctrl-C interrupts anything: several ranks must
                end after the same step.
        """
        self.signum: int | None = None
        self.aborted = False
        self._at_once, self._deferring, self._since = at_once, False, 0.0

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Handle the signals while inside (in the main thread; elsewhere there are none)."""
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
        """Hold a first request back until the block ends."""
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

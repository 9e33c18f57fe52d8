"""Ctrl-C during training."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interrupt:
    """Ctrl-C: at once, except while weights change, when the step is finished first. A second one
    is never held back."""

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Handle SIGINT while inside (in the main thread; elsewhere there is nothing to handle)."""
        try:
            previous = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a first Ctrl-C back until the block ends."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _on_signal(self, _signum: int, _frame: object) -> None:
        if self.requested or not self._deferring:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True

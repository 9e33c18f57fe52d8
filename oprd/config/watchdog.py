"""What ends a run that has gone wrong, or says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.errors import Problems

Action = Literal["stop", "warn", "ignore"]


@dataclass
class LossWatch:
    """A loss has exploded: for ``patience`` steps in a row it is further than ``factor`` spreads
    from its median over the ``window`` quiet steps before.

    The spread is 1.4826 times the median absolute deviation, at least half the median's absolute
    value: the default factor 8 allows five times the median and 8 standard deviations of the noise.
    Of a loss that was never negative only a rise counts; of others, as ``opd_top1``'s, a fall too.

    Attributes:
        action: ``stop`` (with a checkpoint), ``warn`` or ``ignore``.
        factor, window, patience: see above.
    """

    action: Action = "stop"
    factor: float = 8.0
    window: int = 20
    patience: int = 5


@dataclass
class LengthWatch:
    """Responses have become too long, for ``patience`` steps in a row: their mean length is above
    ``factor`` times its median over the first ``window`` steps, or the truncated share is above
    ``truncated``, which over these it was not.

    Attributes:
        action: ``stop`` (with a checkpoint), ``warn`` or ``ignore``.
        truncated, factor, window, patience: see above.
    """

    action: Action = "warn"
    truncated: float = 0.5
    factor: float = 4.0
    window: int = 10
    patience: int = 5


@dataclass
class WatchdogConfig:
    """What ends a run that has gone wrong. Losses that are not finite always do.

    Attributes:
        loss: of every objective.
        length: of the responses.
        timeout_s: seconds in which no rank makes progress (a phase begun or ended, a token
            generated) after which the run is ended, with a message that names the rank and phase
            and every rank's stacks in ``hung/``; exit code 124. Collectives may wait four times as
            long. A rank that can't watch (stuck in native code that keeps Python's lock, or cut off
            from the others) ends after twice as long, its stacks on stderr; exit code 1. null: no
            such limit.
    """

    loss: LossWatch = field(default_factory=LossWatch)
    length: LengthWatch = field(default_factory=LengthWatch)
    timeout_s: float | None = 3600.0

    def check(self, problems: Problems) -> None:
        """Note every value that is out of range."""
        need = problems.need
        watches: dict[str, LossWatch | LengthWatch] = {"loss": self.loss, "length": self.length}
        for name, watch in watches.items():
            problems.need_at_least_one({f"watchdog.{name}.patience": watch.patience})
            need(watch.factor > 1, f"watchdog.{name}.factor must be above 1, got {watch.factor}")
        need(
            self.loss.window >= 5,
            f"watchdog.loss.window must be at least 5, got {self.loss.window}",
        )
        problems.need_at_least_one({"watchdog.length.window": self.length.window})
        need(
            0 < self.length.truncated <= 1,
            f"watchdog.length.truncated must lie in (0, 1], got {self.length.truncated}",
        )
        need(
            self.timeout_s is None or self.timeout_s > 0,
            f"watchdog.timeout_s must be above 0 or null, got {self.timeout_s}",
        )

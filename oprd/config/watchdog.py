"""Options for the watchdogs, which detect runs that go wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.errors import Problems

Action = Literal["stop", "warn", "ignore"]


@dataclass
class LossWatch:
    """Detection of a loss that explodes.

    A loss has exploded if, for ``patience`` steps in a row, it differs from its median over the
    last ``window`` normal steps by more than ``factor`` times the spread. The spread is 1.4826
    times the median absolute deviation, and at least half the absolute value of the median: the
    default factor of 8 allows five times the median and 8 standard deviations of the noise. If a
    loss was never negative, only a rise counts. Otherwise, as for ``opd_top1``, a fall counts too.

    Attributes:
        action: ``stop`` (end the run with a checkpoint), ``warn`` or ``ignore``.
        factor: allowed distance from the median, in spreads.
        window: number of normal steps that median and spread are computed over.
        patience: number of consecutive steps outside the limit.
    """

    action: Action = "stop"
    factor: float = 8.0
    window: int = 20
    patience: int = 5


@dataclass
class LengthWatch:
    """Detection of responses that become too long.

    Responses are too long if, for ``patience`` steps in a row, their mean length is above
    ``factor`` times its median over the first ``window`` steps, or the share of truncated responses
    is above ``truncated``. The second criterion is off if the median of the share over the first
    ``window`` steps is above ``truncated`` already.

    Attributes:
        action: ``stop`` (end the run with a checkpoint), ``warn`` or ``ignore``.
        truncated: limit of the share of truncated responses.
        factor: limit of the mean length, relative to the first steps.
        window: number of first steps that the medians are computed over.
        patience: number of consecutive steps above a limit.
    """

    action: Action = "warn"
    truncated: float = 0.5
    factor: float = 4.0
    window: int = 10
    patience: int = 5


@dataclass
class WatchdogConfig:
    """Watchdogs, which end a run that goes wrong or warn about it.

    A loss that is not finite always ends the run.

    Attributes:
        loss: watches the loss of every objective.
        length: watches the length of the responses.
        timeout_s: seconds without progress on any rank after which the run ends with exit code 124.
            Progress is the begin or end of a phase, or a generated token. The message names the
            rank and the phase, and ``hung/`` contains the stacks of every rank. Collectives may
            wait four times as long. A rank that can't watch (stuck in native code that holds
            Python's lock, or cut off from the others) ends after twice as long with exit code 1 and
            its stacks on stderr. Null: no limit.
    """

    loss: LossWatch = field(default_factory=LossWatch)
    length: LengthWatch = field(default_factory=LengthWatch)
    timeout_s: float | None = 3600.0

    def check(self, problems: Problems) -> None:
        """Add a problem for every value that is out of range."""
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

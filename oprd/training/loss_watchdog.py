"""Runs that have gone wrong: losses that are not finite or explode, responses that grow without
end. (A rank that hangs: `oprd.observability.hang_watchdog`.)

All of it looks at metrics that are reduced over ranks, so that every rank comes to the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from oprd import distributed
from oprd.config import WatchdogConfig
from oprd.data.rollout import Rollout

SIGMA = 1.4826
"""Standard deviation of normal noise over its median absolute deviation."""


@dataclass(frozen=True)
class Alarm:
    """Something has gone wrong.

    Attributes:
        stop: whether the run is to end.
        message: the metric, its history, and what to do.
    """

    stop: bool
    message: str


class Watchdog:
    """Looks at each step's metrics."""

    def __init__(self, cfg: WatchdogConfig) -> None:
        self.cfg = cfg
        self.quiet: dict[str, list[float]] = {}
        """By metric: the last quiet values of a loss; the first values of a length."""
        self.strange: dict[str, list[float]] = {}
        """By metric: the values of the current row of steps that are not as they should be."""

    def look(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """What is wrong after a step. Whatever was said is not said again until it changes again.

        Args:
            step: that has just been made.
            metrics: reduced over ranks.
        """
        alarms = []
        if self.cfg.loss.action != "ignore":
            losses = [n for n in metrics if n.startswith("actor/") and n.endswith("_loss")]
            alarms += [self._loss(step, name, metrics[name]) for name in losses]
        if self.cfg.length.action != "ignore":
            alarms.append(self._length(step, metrics["response_length/mean"]))
            alarms.append(self._truncated(step, metrics["response_length/clip_ratio"]))
        return [alarm for alarm in alarms if alarm is not None]

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `load_state_dict` takes."""
        return {"quiet": self.quiet, "strange": self.strange}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state it is."""
        self.quiet = {name: list(values) for name, values in state["quiet"].items()}
        self.strange = {name: list(values) for name, values in state["strange"].items()}

    def _loss(self, step: int, name: str, value: float) -> Alarm | None:
        watch, quiet = self.cfg.loss, self.quiet.setdefault(name, [])
        if len(quiet) < watch.window:
            quiet.append(value)
            return None
        centre = median(quiet)
        noise = SIGMA * median(abs(x - centre) for x in quiet)
        allowed = watch.factor * max(noise, abs(centre) / 2)
        away = value - centre if min(quiet) >= 0 else abs(value - centre)
        row = self._row(name, away > allowed, value)
        if not row:
            self.quiet[name] = [*quiet[1:], value]
        if len(row) < watch.patience:
            return None
        self._begin_anew(name)
        begun = step - len(row) + 1
        return Alarm(
            watch.action == "stop",
            f"step {step}: {name} has exploded: {_shown(row)} in steps {begun} to {step}, against "
            f"a median of {centre:.4g} over the {len(quiet)} quiet steps before (more than "
            f"{allowed:.4g} from it is too far). Go back to a checkpoint from before step {begun} "
            "and lower optim.lr, or set optim.max_grad_norm; if this is how the loss should go, "
            "raise watchdog.loss.factor or set watchdog.loss.action to warn",
        )

    def _length(self, step: int, value: float) -> Alarm | None:
        name, watch = "response_length/mean", self.cfg.length
        start = self._start(name, value)
        if start is None:
            return None
        row = self._row(name, value > watch.factor * start, value)
        return self._too_long(
            step, name, row, f"more than watchdog.length.factor={watch.factor:g} times the "
            f"{start:.4g} that it began with",
        )  # fmt: skip

    def _truncated(self, step: int, value: float) -> Alarm | None:
        name, watch = "response_length/clip_ratio", self.cfg.length
        start = self._start(name, value)
        if start is None or start > watch.truncated:
            return None
        row = self._row(name, value > watch.truncated, value)
        return self._too_long(
            step, name, row, f"above watchdog.length.truncated={watch.truncated:g}, and it began "
            f"with {start:.4g}",
        )  # fmt: skip

    def _too_long(self, step: int, name: str, row: list[float], why: str) -> Alarm | None:
        watch = self.cfg.length
        if len(row) != watch.patience:  # said once, at the end of the patience
            return None
        begun = step - len(row) + 1
        return Alarm(
            watch.action == "stop",
            f"step {step}: responses have become too long: {name} was {_shown(row)} in steps "
            f"{begun} to {step}, {why}. Look at some of them: a student that never ends its "
            "responses or repeats itself has not learned the teacher's EOS (compare both "
            "tokenizers'), or optim.lr is too high; if they should be long, raise that limit or "
            "set watchdog.length.action to ignore",
        )

    def _start(self, name: str, value: float) -> float | None:
        """The median of the first steps' values, once they are there."""
        first = self.quiet.setdefault(name, [])
        if len(first) < self.cfg.length.window:
            first.append(value)
            return None
        return median(first)

    def _row(self, name: str, strange: bool, value: float) -> list[float]:
        """The values of the row of strange steps that this one ends."""
        row = self.strange.setdefault(name, [])
        if strange:
            row.append(value)
        else:
            row.clear()
        return row

    def _begin_anew(self, name: str) -> None:
        """Forget what was normal: where only a warning is given, this is the new normal."""
        self.quiet[name], self.strange[name] = [], []


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in values)


def not_finite(losses: Mapping[str, float], by_layer: Mapping[int, float], norm: float) -> str:
    """What of a step is not finite, in words; "" if all is.

    Args:
        losses: by objective.
        by_layer: the representation loss of each compared student block.
        norm: of the gradient.
    """
    objectives = [name for name, loss in losses.items() if not math.isfinite(loss)]
    blocks = [block for block, loss in by_layer.items() if not math.isfinite(loss)]
    if not objectives and not blocks and math.isfinite(norm):
        return ""
    what = "the gradient norm"
    if objectives:
        what = f"the loss of {' and '.join(objectives)}"
        what += f" in student layer(s) {blocks}" if blocks else ""
    return f"{what} is not finite (loss {dict(losses)}, gradient norm {norm})"


def keep_batch(
    directory: Path,
    step: int,
    losses: Mapping[str, float],
    by_layer: Mapping[int, float],
    norm: float,
    rollouts: Sequence[Rollout],
) -> str:
    """Write what a step failed on, this rank's part; returns where it is, or why it is not."""
    file = directory / f"failed_step_{step}_rank_{distributed.rank()}.pt"
    batch = [(r.prompt_ids, r.response_ids) for r in rollouts]
    found = {
        "step": step,
        "losses": dict(losses),
        "layer_losses": dict(by_layer),
        "grad_norm": norm,
    }
    try:
        torch.save(found | {"rollouts": batch}, file)
    except (OSError, RuntimeError) as error:  # of a full disk; a checkpoint is still to be tried
        return f"The batch could not be written to {file}: {error}"
    return f"The batch is in {file}"

"""Detection of losses that are not finite or explode, and of responses that are of no use.

Responses are of no use if they grow too long, or if from the start nearly all are cut or empty.

All checks use metrics that are reduced over ranks, so that every rank reaches the same decision.
`oprd.observability.hang_watchdog` detects ranks that hang.
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
"""Ratio of the standard deviation of normal noise to its median absolute deviation."""
FIRST_STEPS, NEARLY_ALL = 3, 0.9
"""Responses are useless from the start if in each of the first steps this share is cut or empty."""
CUT = (
    "nearly all responses are cut at rollout.max_new_tokens, so that the student never learns to "
    "end one: raise it, or shorten what is asked (data.prompt_suffix). If a language model goes on "
    "and on, its prompts may lack the chat template (data.chat_template=always) or the token that "
    "ends its turn is not among its EOS tokens. If responses are meant to be cut, set "
    "watchdog.length.action to ignore"
)
EMPTY = (
    "nearly all responses end at their first token, so that there is nothing to learn from. A chat "
    "model that is given a prompt without its chat template often does so: set "
    "data.chat_template=always (and look at data.chat_template_kwargs), or try "
    "rollout.temperature=1 and read some responses"
)


@dataclass(frozen=True)
class Alarm:
    """A problem that a watchdog has detected.

    Attributes:
        stop: whether the run must end.
        message: the metric, its recent values, and what the user can do.
    """

    stop: bool
    message: str


class Watchdog:
    """Checks the losses and response lengths of each step."""

    def __init__(self, cfg: WatchdogConfig) -> None:
        self.cfg = cfg
        self.quiet: dict[str, list[float]] = {}
        """By metric: the latest normal values of a loss, or the first values of a length."""
        self.strange: dict[str, list[float]] = {}
        """By metric: the values of the latest consecutive steps outside the limit."""

    def look(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms after a step.

        A problem that persists is reported once.

        Args:
            step: number of the step that has just been made.
            metrics: the step's metrics, reduced over ranks.
        """
        alarms = []
        if self.cfg.loss.action != "ignore":
            losses = [n for n in metrics if n.startswith("actor/") and n.endswith("_loss")]
            alarms += [self._loss(step, name, metrics[name]) for name in losses]
        if self.cfg.length.action != "ignore":
            alarms.append(self._length(step, metrics["response_length/mean"]))
            alarms.append(self._truncated(step, metrics["response_length/clip_ratio"]))
            for name, why in (("clip_ratio", CUT), ("empty_ratio", EMPTY)):
                named = f"response_length/{name}"
                alarms.append(self._useless(step, named, metrics.get(named), why))
        return [alarm for alarm in alarms if alarm is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values for `load_state_dict`."""
        return {"quiet": self.quiet, "strange": self.strange}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
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
            "and lower optim.lr, or set optim.max_grad_norm; if the loss is expected to change so, "
            "raise watchdog.loss.factor or set watchdog.loss.action to warn",
        )

    def _length(self, step: int, value: float) -> Alarm | None:
        name, watch = "response_length/mean", self.cfg.length
        start = self._start(name, value)
        if start is None:
            return None
        row = self._row(name, value > watch.factor * start, value)
        return self._too_long(
            step,
            name,
            row,
            f"more than watchdog.length.factor={watch.factor:g} times the "
            f"{start:.4g} that it began with",
        )

    def _truncated(self, step: int, value: float) -> Alarm | None:
        name, watch = "response_length/clip_ratio", self.cfg.length
        start = self._start(name, value)
        if start is None or start > watch.truncated:
            return None
        row = self._row(name, value > watch.truncated, value)
        return self._too_long(
            step,
            name,
            row,
            f"above watchdog.length.truncated={watch.truncated:g}, and it began with {start:.4g}",
        )

    def _useless(self, step: int, name: str, value: float | None, why: str) -> Alarm | None:
        """Look whether nearly all responses of each of the first steps are cut, or empty.

        This warns once and never ends the run: a recipe may mean it.
        """
        first = self.quiet.setdefault(f"first {name}", [])
        if value is None or len(first) == FIRST_STEPS:
            return None
        first.append(value)
        if len(first) < FIRST_STEPS or min(first) < NEARLY_ALL:
            return None
        shares = ", ".join(f"{x:.0%}" for x in first)
        return Alarm(False, f"step {step}: {why} ({name} was {shares} in the first steps)")

    def _too_long(self, step: int, name: str, row: list[float], why: str) -> Alarm | None:
        watch = self.cfg.length
        if len(row) != watch.patience:  # a longer row has been reported
            return None
        begun = step - len(row) + 1
        return Alarm(
            watch.action == "stop",
            f"step {step}: responses have become too long: {name} was {_shown(row)} in steps "
            f"{begun} to {step}, {why}. Read some of them: a student that never ends its "
            "responses or repeats itself has not learned the teacher's EOS (compare both "
            "tokenizers'), or optim.lr is too high; if long responses are expected, raise that "
            "limit or set watchdog.length.action to ignore",
        )

    def _start(self, name: str, value: float) -> float | None:
        """Return the median over the first ``window`` steps, or None during these steps."""
        first = self.quiet.setdefault(name, [])
        if len(first) < self.cfg.length.window:
            first.append(value)
            return None
        return median(first)

    def _row(self, name: str, strange: bool, value: float) -> list[float]:
        """Record the step's value and return the latest consecutive values outside the limit."""
        row = self.strange.setdefault(name, [])
        if strange:
            row.append(value)
        else:
            row.clear()
        return row

    def _begin_anew(self, name: str) -> None:
        """Clear the history. After a warning, the current level counts as normal."""
        self.quiet[name], self.strange[name] = [], []


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in values)


def not_finite(losses: Mapping[str, float], by_layer: Mapping[int, float], norm: float) -> str:
    """Return a description of the step's values that are not finite, or "" if all are finite.

    Args:
        losses: the loss of each objective.
        by_layer: the representation loss of each compared student block.
        norm: the gradient norm.
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
    """Write this rank's part of a failed step to ``directory``.

    Returns:
        A sentence with the path of the file, or with the reason why it could not be written.
    """
    file = directory / f"failed_step_{step}_rank_{distributed.rank()}.pt"
    batch = [(r.prompt_ids, r.response_ids) for r in rollouts]
    values = {
        "step": step,
        "losses": dict(losses),
        "layer_losses": dict(by_layer),
        "grad_norm": norm,
    }
    try:
        torch.save(values | {"rollouts": batch}, file)
    except (OSError, RuntimeError) as error:  # full disk, say: go on to the checkpoint
        return f"The batch could not be written to {file}: {error}"
    return f"The batch is in {file}"

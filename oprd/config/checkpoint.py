"""Options for checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from oprd.config.data import EvalConfig
from oprd.errors import Problems

BEST = re.compile(r"val/(?P<set>.+)/(avg|best)@(?P<k>\d+)")


@dataclass
class CheckpointConfig:
    """Checkpoints of the whole state: weights, optimizer, random states, position in the data.

    Checkpoints are written to ``<output_dir>/checkpoints``. ``resume`` and ``oprd-export`` read
    them. An interrupted run always writes one.

    Attributes:
        every: number of steps between checkpoints; another one follows the last step. 0: write a
            checkpoint only if the run is interrupted.
        keep_last: number of newest checkpoints to keep; older ones are deleted. Null: keep all.
        keep_best: an evaluation metric, ``val/<set>/avg@<k>`` or ``val/<set>/best@<k>``. Whenever
            it reaches a new maximum, a checkpoint is written and kept in addition to
            ``keep_last``. Null: off.
        asynchronous: write checkpoints in the background, from a copy in main memory.
        allow_changes: dotted names of options that may differ from the checkpoint's when resuming.
    """

    every: int = 0
    keep_last: int | None = 2
    keep_best: str | None = None
    asynchronous: bool = True
    allow_changes: list[str] = field(default_factory=list)

    def check(self, problems: Problems, evaluation: EvalConfig) -> None:
        """Add a problem for every invalid value, given the run's evaluations."""
        problems.need(self.every >= 0, f"checkpoint.every must not be negative, got {self.every}")
        problems.need_at_least_one({"checkpoint.keep_last": self.keep_last})
        if self.keep_best is None:
            return
        match = BEST.fullmatch(self.keep_best)
        sets: Mapping = evaluation.sets
        k = evaluation.samples
        known = [f"val/{name}/avg@{k}" for name, source in sets.items() if source.every]
        problems.need(
            match is not None
            and match["set"] in sets
            and sets[match["set"]].every > 0
            and int(match["k"]) == k,
            f"checkpoint.keep_best={self.keep_best} is not measured during training: "
            f"expected one of {known or 'none, as no eval.sets.<name>.every is set'} (or best@{k})",
        )

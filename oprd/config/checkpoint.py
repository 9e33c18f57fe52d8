"""What a run keeps so that it can go on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from oprd.config.data import EvalConfig
from oprd.errors import Problems

BEST = re.compile(r"val/(?P<set>.+)/(avg|best)@(?P<k>\d+)")


@dataclass
class CheckpointConfig:
    """Checkpoints of everything: weights, optimizer, random states, position in the data.

    A run that is interrupted writes one in any case. They lie in ``<output_dir>/checkpoints`` and
    serve ``resume`` and ``oprd-export``.

    Attributes:
        every: steps between them, and one after the last step; 0: only when interrupted.
        keep_last: delete all but the newest so many; null: keep all.
        keep_best: an evaluation's metric, ``val/<set>/avg@<k>`` or ``best@<k>``: whenever it is
            higher than ever, a checkpoint is written and kept besides; null: off.
        asynchronous: write while training goes on, from a copy in main memory.
        allow_changes: settings, dotted, that may differ from the checkpoint's when resuming.
    """

    every: int = 0
    keep_last: int | None = 2
    keep_best: str | None = None
    asynchronous: bool = True
    allow_changes: list[str] = field(default_factory=list)

    def check(self, problems: Problems, evaluation: EvalConfig) -> None:
        """Note every value that is out of range, or names no metric of ``evaluation``."""
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
            f"checkpoint.keep_best={self.keep_best} is no accuracy measured during training: "
            f"expected one of {known or 'none, as no eval.sets.<name>.every is set'} (or best@{k})",
        )

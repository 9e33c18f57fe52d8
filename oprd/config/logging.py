"""Where metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass
class LoggingConfig:
    """Trackers beside ``metrics.jsonl``, which is written in any case. Rank 0 reports.

    Attributes:
        report_to: ``tensorboard`` (into the run's directory), ``wandb``, ``trackio``; each is an
            extra of this package. Theirs are the environment variables by which they are set up
            (``WANDB_MODE=offline``, ``TRACKIO_DIR``, ..).
        project: of ``wandb`` and ``trackio``.
    """

    report_to: list[Tracker] = field(default_factory=list)
    project: str = "oprd"

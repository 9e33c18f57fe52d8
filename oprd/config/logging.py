"""Options for experiment trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass
class LoggingConfig:
    """Experiment trackers, in addition to ``metrics.jsonl``, which is always written.

    Rank 0 reports.

    Attributes:
        report_to: list of trackers: ``tensorboard`` (writes into the run's directory), ``wandb``,
            ``trackio``. Each is installed by the extra of this package with the same name, and
            configured by its own environment variables (``WANDB_MODE=offline``, ``TRACKIO_DIR``,
            ..).
        project: project name for ``wandb`` and ``trackio``.
    """

    report_to: list[Tracker] = field(default_factory=list)
    project: str = "oprd"

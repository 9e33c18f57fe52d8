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
        diagnostics_every: number of steps between measurements on a sample of the step's positions:
            entropies, the top-16 overlap, the cosine at the beginning and the end of responses,
            gradient norms by part of the model. Their time is in ``time/diagnostics_s``. 0: never.
        teacher_head: keep a teacher's LM head in memory although no objective needs it, to measure
            its entropy and the overlap; without FSDP2. A head that is tied to the embeddings is
            there anyway.
        project: project name for ``wandb`` and ``trackio``.
    """

    report_to: list[Tracker] = field(default_factory=list)
    diagnostics_every: int = 10
    teacher_head: bool = False
    project: str = "oprd"

"""Experiment trackers: TensorBoard, Weights & Biases, Trackio.

A tracker that fails is reported once, gets no further metrics and never ends a run.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from oprd.atomic_files import write_whole
from oprd.config import LoggingConfig
from oprd.errors import need_package

logger = logging.getLogger(__name__)

IDENTITY = "tracker_id"
"""File in a run's directory with the name under which trackers recognise a resumed run."""


class Tracker(Protocol):
    """A destination for metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Write pending metrics and close."""


class TensorBoard:
    """TensorBoard event files in ``tensorboard/`` of the run's directory."""

    def __init__(
        self, cfg: LoggingConfig, directory: Path, name: str, config: Mapping, step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run drops the events of later steps than its checkpoint.
        purge = step + 1 if step else None
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record each number as a curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


class WandB:
    """A run on Weights & Biases."""

    def __init__(
        self, cfg: LoggingConfig, directory: Path, name: str, config: Mapping, step: int
    ) -> None:
        import wandb

        self.run = wandb.init(
            project=cfg.project,
            name=directory.name,
            id=name,
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )
        # wandb's own step counter can't go back to the checkpoint that a run is resumed from.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record each number as a curve."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Upload pending metrics and close the run."""
        self.run.finish()


class Trackio:
    """A Trackio run, on this machine or where Trackio's environment variables point."""

    def __init__(
        self, cfg: LoggingConfig, directory: Path, name: str, config: Mapping, step: int
    ) -> None:
        import trackio

        self.run = trackio.init(
            project=cfg.project, name=name, resume="allow", config=dict(config), embed=False
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record each number as a curve."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Write pending metrics and close."""
        self.run.finish()


TRACKERS: dict[str, Callable[[LoggingConfig, Path, str, Mapping, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(cfg: LoggingConfig) -> None:
    """Check that the package of every requested tracker is installed.

    Raises:
        ConfigError: if one is missing; the message names the extra that installs it.
    """
    for name in cfg.report_to:
        need_package(name, name, f"logging.report_to={name}")


class Trackers:
    """All trackers of a run."""

    def __init__(
        self,
        cfg: LoggingConfig,
        directory: Path,
        config: Mapping[str, Any],
        step: int,
    ) -> None:
        """
        Args:
            directory: the run's directory.
            config: the run's configuration, as plain values.
            step: number of steps already made; above 0 in a resumed run.
        """
        self._open: dict[str, Tracker] = {}
        name = _identity(directory) if cfg.report_to else ""
        for kind in cfg.report_to:
            opened = self._tried(
                kind, lambda k=kind: TRACKERS[k](cfg, directory, name, config, step)
            )
            if opened is not None:
                self._open[kind] = opened

    def log(self, record: Mapping[str, Any]) -> None:
        """Record the numbers of one line of ``metrics.jsonl`` at its ``step``.

        Each entry of a list becomes a metric of its own. A teacher's metrics get its name as a
        prefix.
        """
        who = record.get("model", "student")
        prefix = "" if who.startswith("student") else f"{who.replace(' ', '_')}/"
        values: dict[str, float] = {}
        for key, value in record.items():
            if isinstance(value, list):
                values |= {f"{prefix}{key}/{i}": x for i, x in enumerate(value)}
            elif isinstance(value, int | float) and key != "step":
                values[prefix + key] = value
        for kind, tracker in list(self._open.items()):
            self._tried(kind, tracker.log, record["step"], values)

    def close(self) -> None:
        """Write pending metrics and close."""
        for kind, tracker in list(self._open.items()):
            self._tried(kind, tracker.close)
        self._open.clear()

    def _tried(self, kind: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a tracker and return its result; a tracker that fails is not called again."""
        try:
            return call(*arguments)
        except Exception as error:  # no error of a tracker may end the run
            self._open.pop(kind, None)
            logger.warning(
                f"{kind} has failed and gets no more metrics ({type(error).__name__}: "
                f"{error}); metrics.jsonl has all of them"
            )
            return None


def _identity(directory: Path) -> str:
    """Return the run's name for its trackers, which stays the same when the run is resumed."""
    file = directory / IDENTITY
    if not file.exists():
        plain = re.sub(r"[^\w.-]", "_", directory.name)
        write_whole(file, f"{plain}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text().strip()

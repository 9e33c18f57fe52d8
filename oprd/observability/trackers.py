"""Experiment trackers: TensorBoard, Weights & Biases, Trackio. What goes wrong with one of them is
said once and never ends a run."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from oprd.config import LoggingConfig
from oprd.errors import need_package

IDENTITY = "tracker_id"
"""File in a run's directory by which a resumed run is the same one to its trackers."""


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's directory."""

    def __init__(
        self, cfg: LoggingConfig, directory: Path, name: str, config: Mapping, step: int
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the checkpoint that is resumed from goes.
        purge = step + 1 if step else None
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A curve for each number."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class WandB:
    """Weights & Biases."""

    def __init__(
        self, cfg: LoggingConfig, directory: Path, name: str, config: Mapping, step: int
    ) -> None:
        import wandb

        self.run = wandb.init(
            project=cfg.project, name=directory.name, id=name, resume="allow", dir=str(directory),
            config=dict(config),
        )  # fmt: skip
        # Its own count can't go back to the checkpoint that a run is resumed from.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """A curve for each number."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()


class Trackio:
    """Trackio, on this machine or where its environment variables say."""

    def __init__(
        self, cfg: LoggingConfig, directory: Path, name: str, config: Mapping, step: int
    ) -> None:
        import trackio

        self.run = trackio.init(
            project=cfg.project, name=name, resume="allow", config=dict(config), embed=False
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """A curve for each number."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


TRACKERS: dict[str, Callable[[LoggingConfig, Path, str, Mapping, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(cfg: LoggingConfig) -> None:
    """Check that every tracker's package is there.

    Raises:
        ConfigError: naming the extra that installs it.
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
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            directory: the run's.
            config: the run's, as plain values.
            step: steps made; above 0 in a run that is resumed.
            say: takes a warning.
        """
        self._say = say
        self._open: dict[str, Tracker] = {}
        name = _identity(directory) if cfg.report_to else ""
        for kind in cfg.report_to:
            opened = self._tried(
                kind, lambda k=kind: TRACKERS[k](cfg, directory, name, config, step)
            )
            if opened is not None:
                self._open[kind] = opened

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``: its numbers, at its ``step``. A list becomes one number for
        each place; what is measured of a teacher goes under its name."""
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
        """Write what is left."""
        for kind, tracker in list(self._open.items()):
            self._tried(kind, tracker.close)
        self._open.clear()

    def _tried(self, kind: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call to a tracker returns; one that fails is not called again."""
        try:
            return call(*arguments)
        except Exception as error:  # whatever it is, the run is worth more
            self._open.pop(kind, None)
            self._say(
                f"warning: {kind} has failed and gets no more metrics ({type(error).__name__}: "
                f"{error}); metrics.jsonl has all of them"
            )
            return None


def _identity(directory: Path) -> str:
    """The run's name to its trackers, the same when it is resumed."""
    file = directory / IDENTITY
    if not file.exists():
        plain = re.sub(r"[^\w.-]", "_", directory.name)
        file.write_text(f"{plain}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text().strip()

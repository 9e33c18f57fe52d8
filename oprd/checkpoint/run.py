"""A run's checkpoints: when to write one, what it contains, which one is the best."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd import distributed
from oprd.checkpoint import files, rng, state
from oprd.checkpoint.files import Checkpoint
from oprd.checkpoint.resume import CHECKPOINTS, settings
from oprd.checkpoint.writer import WriteFailed, Writer, write_best
from oprd.config import TrainConfig
from oprd.errors import ConfigError

logger = logging.getLogger(__name__)

MOMENTS = 2
"""Number of AdamW's moments; each is as large as the weights, or float32 (optim.rounding)."""


class RunCheckpoints:
    """Writer of a run's checkpoints, and loader of the one that the run resumes from.

    Attributes:
        last: path of the newest complete checkpoint.
        failure: the reason why the last write failed; None if it succeeded.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        directory: Path,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        resumed: Checkpoint | None,
    ) -> None:
        """Collective.

        Args:
            directory: the run's directory.
            device: the device that this rank computes on.
            resumed: the checkpoint that the run resumes from, if any.
        """
        self.cfg, self.directory = cfg, directory / CHECKPOINTS
        self.student, self.device, self.resumed = student, device, resumed
        self.last = None if resumed is None else resumed.path
        self.failure: str | None = None
        self.best = self._known_best()
        self._writer = Writer(
            self.directory,
            self.device,
            asynchronous=cfg.checkpoint.asynchronous,
            keep_last=cfg.checkpoint.keep_last,
            model_files=model_files(student, tokenizer) if distributed.rank() == 0 else {},
        )

    def load(self, optimizer: Optimizer) -> None:
        """Load student, optimizer and random states from the checkpoint; collective.

        A rank that has no random state in the checkpoint is seeded from the run's seed.

        Raises:
            ConfigError: if the checkpoint is of another model.
        """
        assert self.resumed is not None
        random_state = state.load(
            self.resumed.path, self.student, optimizer, distributed.rank(), self._writer.group
        )
        if random_state is not None:
            rng.restore(random_state, self.device)
        else:
            distributed.seed_everything(self.cfg.seed + 7919 * self.resumed.step)
        ranks, before = distributed.world_size(), self.resumed.document["ranks"]
        if ranks != before:
            logger.info(
                f"note: the checkpoint was written by {before} ranks and goes on with {ranks}: the "
                "prompts stay the same, but the sampled responses change"
            )

    def saved_rollouts(self) -> list[Any]:
        """Return the ``rollouts`` that each rank gave to `save`; empty if there were none."""
        assert self.resumed is not None
        return state.load_packed(self.resumed.path, state.ROLLOUTS, self._writer.group)

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether an evaluation is the best so far; a checkpoint is then due."""
        metric = self.cfg.checkpoint.keep_best
        if metric is None or metric not in metrics:
            return False
        self.finish()  # a failed write of the best one resets self.best
        value = metrics[metric]
        if self.best is not None and value <= self.best["value"]:
            return False
        self.best = {"metric": metric, "value": value, "step": step}
        return True

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due at this step, regardless of evaluations."""
        every = self.cfg.checkpoint.every
        return every > 0 and (step % every == 0 or step == self.cfg.steps)

    def save(
        self,
        step: int,
        optimizer: Optimizer,
        random: Tensor,
        rollouts: Any,
        progress: Mapping[str, Any],
    ) -> None:
        """Start writing a checkpoint, unless this step has one already; collective.

        `save`, `poll` and `finish` report a failed write to the user once it is known.

        Args:
            random: this rank's random state, from `oprd.checkpoint.rng.capture`.
            rollouts: JSON values for `saved_rollouts`: this rank's rollouts of the next step, if
                they were sampled already; else None.
            progress: further JSON values that the run needs to resume.
        """
        self.finish()
        if self.last is not None and self.last.name == files.step_name(step):
            self._note_best(step)
            return
        tensors = state.model_tensors(self.student)
        tensors |= state.optimizer_tensors(self.student, optimizer)
        tensors[f"{state.RNG}{distributed.rank()}"] = random
        if rollouts is not None:
            tensors[f"{state.ROLLOUTS}{distributed.rank()}"] = state.packed(rollouts)
        document = {
            "step": step,
            "ranks": distributed.world_size(),
            "torch": torch.__version__,
            "settings": settings(self.cfg),
            "best": self.best,
            **progress,
        }
        self._writer.write(tensors, document)
        if not self.cfg.checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Record the outcome of a write that has ended since the last call.

        A full or failing disk is reported to the user as a warning.

        Raises:
            Exception: any other error of the write.
        """
        self._settle(self._writer.finished)

    def finish(self) -> Path | None:
        """Wait for the current write and return the newest complete checkpoint.

        Raises:
            Exception: see `poll`.
        """
        self._settle(self._writer.wait)
        return self.last

    def close(self) -> None:
        """Wait for the current write, ignore its outcome, and stop the writer."""
        self._writer.close()

    def _settle(self, ask: Callable[[], Path | None]) -> None:
        try:
            path = ask()
        except WriteFailed as error:
            self.failure = str(error)
            self.best = files.read_best(self.directory)
            logger.warning(f"{error}. The last complete checkpoint: {self.last or 'none'}")
            return
        if path is not None:
            self.last, self.failure = path, None

    def _note_best(self, step: int) -> None:
        if self.best is not None and self.best["step"] == step and distributed.rank() == 0:
            write_best(self.directory, self.best)

    def _known_best(self) -> dict[str, Any] | None:
        """Return the best checkpoint that the resumed one recorded, and update `BEST` to match.

        It is None if that checkpoint is gone or ``checkpoint.keep_best`` names another metric.
        """
        best = None if self.resumed is None else self.resumed.document["best"]
        if best is not None and (
            best["metric"] != self.cfg.checkpoint.keep_best
            or not (self.directory / files.step_name(best["step"])).is_dir()
        ):
            best = None
        if distributed.rank() == 0:
            if best is not None:
                write_best(self.directory, best)
            else:
                (self.directory / files.BEST).unlink(missing_ok=True)
        return best


def model_files(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the files of Hugging Face's layout other than the weights, by name."""
    with tempfile.TemporaryDirectory() as directory:
        student.config.save_pretrained(directory)
        if student.can_generate():
            student.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return {f.name: f.read_bytes() for f in Path(directory).iterdir() if f.is_file()}


def check_shared(directory: Path, device: torch.device, patience_s: float = 30.0) -> None:
    """Check that every rank sees the run's directory, where all write their shards. Collective.

    Args:
        patience_s: seconds that a network file system may take to show a file of rank 0.

    Raises:
        ConfigError: on all ranks, if one rank does not see the directory.
    """
    token = directory / distributed.from_rank_0(f".{uuid.uuid4().hex}")
    if distributed.rank() == 0:
        token.touch()
    deadline = time.monotonic() + patience_s
    distributed.wait_for_all()
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    missing = distributed.max_over_ranks(float(not seen), device)
    if distributed.rank() == 0:
        token.unlink()
    if missing:
        raise ConfigError(
            f"output_dir {directory} is not the same for all ranks: with several nodes, choose a "
            "directory on a file system that all of them share"
        )


def check_space(cfg: TrainConfig, directory: Path, student: nn.Module) -> None:
    """Check that the checkpoints and the final student fit on the disk.

    Args:
        directory: the run's existing directory.

    Raises:
        ConfigError: if they don't fit; the message gives the sizes.
    """
    c = cfg.checkpoint
    moments = MOMENTS * (2 if cfg.optim.rounding == "stochastic" else 1)
    size = (1 + moments) * state.num_bytes(state.model_tensors(student))
    number = -(-cfg.steps // c.every) if c.every else 1
    if c.keep_best is not None:
        every = min(s.every for s in cfg.eval.sets.values() if s.every)
        number += -(-cfg.steps // every)
    if c.keep_last is not None:  # plus the one being written
        number = min(number, c.keep_last + 1 + (c.keep_best is not None))
    model = state.num_bytes(dict(student.named_parameters()))
    kept = files.find(directory / CHECKPOINTS)[0]  # newer checkpoints replace these
    there = sum(size for c in kept for size, _ in c.document["files"].values())
    needed = number * size + model - there
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"output_dir {directory} has {free / 1e9:.2f} GB free, and the run needs "
            f"{needed / 1e9:.2f} GB more: {number} checkpoint(s) of {size / 1e9:.2f} GB, "
            f"including the one being written, and the student of {model / 1e9:.2f} GB. Make room, "
            "keep fewer (checkpoint.keep_last), or choose another output_dir"
        )

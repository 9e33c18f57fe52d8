"""A run's checkpoints: when they are due, what is in them, which is the best."""

from __future__ import annotations

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

MOMENTS = 2
"""Of AdamW, each as large as the weights."""


class RunCheckpoints:
    """Writes the checkpoints of a run and, at its start, loads one.

    Attributes:
        last: the newest that is complete.
        failure: why the last attempt to write one failed; None if it did not.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        directory: Path,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        resumed: Checkpoint | None,
        say: Callable[[str], None],
    ) -> None:
        """Collective.

        Args:
            directory: the run's.
            device: of this rank's computations.
            resumed: what it goes on from.
            say: shows the user a line.
        """
        self.cfg, self.directory, self.say = cfg, directory / CHECKPOINTS, say
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
        """Student, optimizer and random states as the checkpoint has them; collective.

        Ranks that the run did not have before get random states from its seed.

        Raises:
            ConfigError: if the checkpoint is of another model.
        """
        assert self.resumed is not None
        found = state.load(
            self.resumed.path, self.student, optimizer, distributed.rank(), self._writer.group
        )
        if found is not None:
            rng.restore(found, self.device)
        else:
            distributed.seed_everything(self.cfg.seed + 7919 * self.resumed.step)
        ranks, before = distributed.world_size(), self.resumed.document["ranks"]
        if ranks != before:
            self.say(
                f"note: the checkpoint was written by {before} ranks and goes on with {ranks}: the "
                "prompts are the same, what is sampled is not"
            )

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best so far; then a checkpoint is due."""
        metric = self.cfg.checkpoint.keep_best
        if metric is None or metric not in metrics:
            return False
        self.finish()  # what is in writing may be the best
        value = metrics[metric]
        if self.best is not None and value <= self.best["value"]:
            return False
        self.best = {"metric": metric, "value": value, "step": step}
        return True

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, whatever evaluations say."""
        every = self.cfg.checkpoint.every
        return every > 0 and (step % every == 0 or step == self.cfg.steps)

    def save(
        self, step: int, optimizer: Optimizer, random: Tensor, progress: Mapping[str, Any]
    ) -> None:
        """Begin to write a checkpoint, unless this step has one; collective. A failure is said when
        it is known, by this or by `poll` or `finish`.

        Args:
            random: this rank's random state, by `oprd.checkpoint.rng.capture`.
            progress: JSON: what the run needs besides.
        """
        self.finish()
        if self.last is not None and self.last.name == files.step_name(step):
            self._note_best(step)
            return
        tensors = state.model_tensors(self.student)
        tensors |= state.optimizer_tensors(self.student, optimizer)
        tensors[f"{state.RNG}{distributed.rank()}"] = random
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
        """Say what came of a write that has ended.

        Raises:
            Exception: what went wrong, if it was not for want of room or a failing disk.
        """
        self._settle(self._writer.finished)

    def finish(self) -> Path | None:
        """Wait for the write under way; returns the newest complete checkpoint.

        Raises:
            Exception: as `poll`.
        """
        self._settle(self._writer.wait)
        return self.last

    def close(self) -> None:
        """Wait, whatever comes of it, and end."""
        self._writer.close()

    def _settle(self, ask: Callable[[], Path | None]) -> None:
        try:
            path = ask()
        except WriteFailed as error:
            self.failure = str(error)
            self.best = files.read_best(self.directory)
            self.say(f"warning: {error}. The last complete one: {self.last or 'none'}")
            return
        if path is not None:
            self.last, self.failure = path, None

    def _note_best(self, step: int) -> None:
        if self.best is not None and self.best["step"] == step and distributed.rank() == 0:
            write_best(self.directory, self.best)

    def _known_best(self) -> dict[str, Any] | None:
        """The best when the checkpoint was written, if it is still what is asked for."""
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
    """By name, what Hugging Face's layout has besides weights."""
    with tempfile.TemporaryDirectory() as directory:
        student.config.save_pretrained(directory)
        if student.can_generate():
            student.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return {f.name: f.read_bytes() for f in Path(directory).iterdir() if f.is_file()}


def check_shared(directory: Path, device: torch.device, patience_s: float = 30.0) -> None:
    """Check that every rank sees the run's directory, where all write their shards. Collective.

    Args:
        patience_s: seconds until a network file system must show what rank 0 has written.

    Raises:
        ConfigError: on all ranks, if one does not.
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
            f"output_dir {directory} is not the same for all ranks: those of several nodes need a "
            "directory on a file system that they share"
        )


def check_space(cfg: TrainConfig, directory: Path, student: nn.Module) -> None:
    """Whether what the run will keep fits on the disk.

    Args:
        directory: the run's; exists.

    Raises:
        ConfigError: with the sizes.
    """
    c = cfg.checkpoint
    size = (1 + MOMENTS) * state.num_bytes(state.model_tensors(student))
    number = -(-cfg.steps // c.every) if c.every else 1
    if c.keep_best is not None:
        every = min(s.every for s in cfg.eval.sets.values() if s.every)
        number += -(-cfg.steps // every)
    if c.keep_last is not None:  # and the one in writing
        number = min(number, c.keep_last + 1 + (c.keep_best is not None))
    model = state.num_bytes(dict(student.named_parameters()))
    kept = files.find(directory / CHECKPOINTS)[0]  # which newer ones replace
    there = sum(size for c in kept for size, _ in c.document["files"].values())
    needed = number * size + model - there
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"output_dir {directory} has {free / 1e9:.2f} GB free, and the run needs "
            f"{needed / 1e9:.2f} GB more: {number} checkpoint(s) of {size / 1e9:.2f} GB, one of "
            f"them in writing, and the student of {model / 1e9:.2f} GB. Make room, keep fewer "
            "(checkpoint.keep_last), or choose another output_dir"
        )

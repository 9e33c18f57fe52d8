"""One optimizer step of the student on a step's rollouts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oprd import distributed
from oprd.config import TrainConfig
from oprd.data.rollout import Rollout, rollout_metrics
from oprd.distill.objectives import Objectives, StudentPass, TeacherPass
from oprd.distributed.fsdp import clip_gradients
from oprd.models.recompute import recompute_blocks
from oprd.observability.memory import PeakMemory
from oprd.observability.timer import PhaseTimer
from oprd.training.batches import GlobalBatch, MicroBatch, global_batch
from oprd.training.inputs import RunInputs
from oprd.training.loss_watchdog import keep_batch, not_finite
from oprd.training.metrics import (
    gradient_norms,
    loss_metrics,
    memory_metrics,
    reduced_losses,
    rep_metrics,
    sample_metrics,
    time_metrics,
)
from oprd.training.optimizer import all_finite, make_optimizer
from oprd.training.overlap import in_order, side_stream
from oprd.training.recompute import is_out_of_memory
from oprd.training.rounding import UpdateWatch

logger = logging.getLogger(__name__)

SAMPLED = 256
"""Positions of a rank's first micro-batch that diagnostics look at."""


class NotFinite(ArithmeticError):
    """Raised on all ranks if a loss, a gradient or a weight is not finite.

    Attributes:
        weights: whether the weights are already spoilt. If not, the step left them as they were.
    """

    def __init__(self, message: str, *, weights: bool) -> None:
        super().__init__(message)
        self.weights = weights


class StudentUpdate:
    """Makes the optimizer steps; holds the optimizer and the schedule of its learning rate."""

    def __init__(
        self,
        cfg: TrainConfig,
        inputs: RunInputs,
        student: nn.Module,
        objectives: Objectives,
        *,
        sharded: bool,
        recomputed: int,
        timer: PhaseTimer,
        autocast: Callable[[], AbstractContextManager],
        directory: Path,
        device: torch.device,
    ) -> None:
        """
        Args:
            sharded: whether FSDP2 sums the gradients over ranks.
            recomputed: the number of the student's blocks whose activations are recomputed.
            directory: where the rollouts of a loss that is not finite are kept.
        """
        assert inputs.tokenizer is not None
        self.cfg, self.inputs, self.student = cfg, inputs, student
        self.objectives, self.sharded, self.recomputed = objectives, sharded, recomputed
        self.timer, self.autocast = timer, autocast
        self.directory, self.device = directory, device
        self.pad = inputs.tokenizer.pad_token_id
        self.optimizer, self.scheduler = make_optimizer(student, cfg.optim, cfg.steps, cfg.seed)
        self.watch = UpdateWatch(student.parameters(), cfg.optim.rounding)
        self.stream = side_stream(cfg, device)

    def __call__(self, rollouts: list[Rollout], step: int) -> dict[str, Any]:
        """Make one optimizer step on this rank's rollouts and return its metrics. Collective.

        Args:
            step: number of steps made before.

        Raises:
            NotFinite: if a loss, a gradient or a weight is not finite.
        """
        cfg, device = self.cfg, self.device
        work = global_batch(
            rollouts, self.objectives, cfg, self.pad, self.inputs.teacher_tokenizers, device
        )
        every = cfg.logging.diagnostics_every
        is_due = bool(every) and step % every == 0
        outputs, peaks, metrics = self._backward_in_memory(work, SAMPLED if is_due else 0)
        metrics |= work.metrics
        if not self.sharded:
            with self.timer("student update"):
                distributed.sum_gradients(self.student.parameters(), device)
        if is_due:
            with self.timer("diagnostics"):
                metrics |= gradient_norms(self.student, self.objectives.decoder)
        with self.timer("student update"), PeakMemory(device) as peak:
            norm = clip_gradients(self.student.parameters(), cfg.optim.max_grad_norm)
            losses, layer_losses = reduced_losses(outputs, device)
            self._check_loss(step + 1, losses, layer_losses, norm, rollouts)
            lr = float(self.scheduler.get_last_lr()[0])
            start = time.perf_counter()  # the losses have been read: the GPU has no work left
            with self.watch.watching():
                self.optimizer.step()
            self._check_weights(step + 1)
            metrics["perf/optimizer_s"] = time.perf_counter() - start
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.student.eval()
        metrics |= loss_metrics(losses)
        metrics |= {"actor/grad_norm": norm, "actor/lr": lr} | self.watch.metrics()
        metrics |= rollout_metrics(rollouts, device, bool(self.inputs.aligners))
        metrics |= time_metrics(self.timer.take_step(), metrics["rollout/tokens"])
        metrics |= memory_metrics([*peaks, peak], device)
        return metrics | self._rep_metrics(outputs, layer_losses)

    def _backward_in_memory(
        self, work: GlobalBatch, sampled: int
    ) -> tuple[list[StudentPass], list[PeakMemory], dict[str, Any]]:
        """Run `_backward`; if ``gradient_checkpointing`` is ``auto``, recompute more if it fails.

        Several ranks do not try again: those whose allocations succeed would wait for the others.
        """
        layers = self.objectives.decoder.num_layers
        while True:
            self.student.train()
            try:
                return self._backward(work, sampled)
            except RuntimeError as error:
                may = self.cfg.student.gradient_checkpointing == "auto" and self.recomputed < layers
                if not (may and distributed.world_size() == 1 and is_out_of_memory(error)):
                    raise
            # Not above, where the exception still holds the activations.
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            more = self.recomputed + (layers - self.recomputed + 1) // 2
            self.recomputed = recompute_blocks(self.student, more)
            logger.warning(
                f"an allocation failed: {more} of {layers} blocks are recomputed from now on"
            )

    def _backward(
        self, work: GlobalBatch, sampled: int
    ) -> tuple[list[StudentPass], list[PeakMemory], dict[str, Any]]:
        """Run teacher and student on each micro-batch and add up the student's gradients.

        Args:
            sampled: number of positions of the first micro-batch to diagnose.

        Returns:
            The student's passes, the memory that each took, and the diagnostics.
        """
        outputs: list[StudentPass] = []
        peaks: list[PeakMemory] = []
        measured: dict[str, Any] = {}
        passes = in_order(work.micro_batches, self._teacher_pass, self._is_free, self.stream)
        for part in work.micro_batches:
            with self.timer("teacher", queued=True):
                teacher = next(passes)()
            with self.timer("student update", queued=True), PeakMemory(self.device) as peak:
                with self.autocast():
                    out = self.objectives.student_pass(
                        part.batch,
                        part.chosen,
                        teacher,
                        work.totals,
                        sampled=0 if outputs else sampled,
                    )
                out.loss.backward()
            if out.sample is not None:
                with self.timer("diagnostics"):
                    found = self.objectives.diagnose(out.sample, part.teacher)
                    measured = sample_metrics(found, self.device)
            teacher.release()
            outputs.append(replace(out, sample=None))
            peaks.append(peak)
            del teacher
        passes.close()
        return outputs, peaks, measured

    def _teacher_pass(self, part: MicroBatch) -> TeacherPass:
        with self.autocast():
            return self.objectives.teacher_pass(part.batch, part.chosen, part.teacher)

    def _is_free(self, part: MicroBatch) -> bool:
        """Return whether the teacher may run beside the student: it has weights of its own."""
        teacher = self.cfg.all_teachers[part.teacher]
        return self.cfg.overlap and not teacher.shares_student

    def _check_loss(
        self,
        step: int,
        losses: dict[str, float],
        layer_losses: list[float],
        norm: float,
        rollouts: list[Rollout],
    ) -> None:
        distiller = self.objectives.distiller
        blocks = [] if distiller is None else [block for block, _ in distiller.pairs]
        by_layer = dict(zip(blocks, layer_losses, strict=True))
        if what := not_finite(losses, by_layer, norm):
            batch = keep_batch(self.directory, step, losses, by_layer, norm, rollouts)
            self.optimizer.zero_grad()
            raise NotFinite(
                f"step {step}: {what}. {batch}. Lower optim.lr, or use float32 for models in "
                "float16",
                weights=False,
            )

    def _check_weights(self, step: int) -> None:
        spoilt = float(not all_finite(self.student.parameters()))
        if distributed.max_over_ranks(spoilt, self.device):
            raise NotFinite(
                f"step {step}: the gradients are finite, but the weights after the step of the "
                "optimizer are not. Lower optim.lr.",
                weights=True,
            )

    def _rep_metrics(
        self, outputs: list[StudentPass], layer_losses: list[float]
    ) -> dict[str, float]:
        distiller = self.objectives.distiller
        if distiller is None:
            return {}
        reps = [out.rep for out in outputs if out.rep is not None]
        return rep_metrics(reps, layer_losses, distiller.compared_width, self.device)

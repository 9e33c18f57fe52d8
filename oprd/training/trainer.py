"""The training loop of on-policy representation distillation.

    oprd-train [--config recipes/x.yaml] [--optim.lr 1e-5 ..]
    torchrun --nproc-per-node 2 -m oprd.cli.train [..]

Each step draws prompts, samples responses from the student (`rollouts`), runs the teacher and then
the student with taps on these responses, backpropagates, clips the gradients and updates the
student (`update`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from oprd import distributed
from oprd.checkpoint import RunCheckpoints, resume, rng, save_student
from oprd.checkpoint.resume import done_already
from oprd.checkpoint.run import check_shared, check_space
from oprd.config import TrainConfig
from oprd.data.rollout import Rollout
from oprd.data.sampler import PromptSampler
from oprd.engines.base import Engine, EngineFailure
from oprd.engines.factory import make_engine
from oprd.engines.vllm.environment import cores_shared
from oprd.observability import hang_watchdog
from oprd.observability.console import shown
from oprd.observability.run_log import RunLog
from oprd.observability.signals import Interrupt
from oprd.observability.summary import Summary, plain, write_summary
from oprd.observability.timer import PhaseTimer
from oprd.training.evaluator import AFTER, BEFORE, DURING, Evaluator, Subject
from oprd.training.inputs import RunInputs
from oprd.training.loss_watchdog import Alarm, Watchdog
from oprd.training.optimizer import fast_forward
from oprd.training.overview import overview
from oprd.training.preflight import output_dir, preflight
from oprd.training.recompute import choose_blocks
from oprd.training.rollouts import Rollouts
from oprd.training.setup import Builder, autocast
from oprd.training.update import NotFinite, StudentUpdate

logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """Raised if a run can't continue. The message names the last checkpoint, if there is one."""


class Trainer:
    """A training run and its state; `run` executes it."""

    def __init__(self, cfg: TrainConfig, inputs: RunInputs) -> None:
        assert inputs.tokenizer is not None
        assert inputs.train is not None
        self.cfg, self.inputs = cfg, inputs
        self.tokenizer = inputs.tokenizer
        w = cfg.watchdog
        self.device = distributed.init(cfg.device, cfg.fsdp.mode == "always", w.timeout_s)
        # The default name contains the time, which may differ between ranks.
        self.directory = distributed.from_rank_0(output_dir(cfg))
        self.notes, candidates = list(inputs.notes), distributed.from_rank_0(inputs.resume)
        self.resumed = resume.choose(candidates, self.notes.append)
        if distributed.rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.notes += resume.tidy(self.directory, self.resumed, candidates)
        # Also a barrier: no rank reads the directory before rank 0 has tidied it.
        self.notes = distributed.from_rank_0(self.notes)
        check_shared(self.directory, self.device)
        self.log = RunLog(self.directory, cfg.steps, cfg.log_every, distributed.rank() == 0)
        self.timer = PhaseTimer(self.device)
        self._autocast = partial(autocast, cfg.autocast, self.device)
        self.watchdog = Watchdog(w)
        self.interrupt = Interrupt(at_once=distributed.world_size() == 1)
        self.stopped_by: int | None = None
        prompts = inputs.train.prompts
        self.batches = PromptSampler(len(prompts), cfg.rollout.prompts_per_step, cfg.seed)
        self.step = 0  # the number of steps made
        self.evaluated = 0  # the last step whose evaluation, if due, is done
        self.delta_peak_gb: float | None = None
        self.evaluator = Evaluator(
            cfg.eval,
            inputs,
            self.log,
            self.timer,
            self._autocast,
            self._synced,
            cfg.rollout.engine,
        )
        self.closing = contextlib.ExitStack()
        self.closing.callback(self.log.close)
        if self.resumed is not None:
            self._recall(self.resumed.document)

    def run(self) -> Summary:
        """Evaluate the student, train it, save it and evaluate it again."""
        cfg, log = self.cfg, self.log
        ranks = distributed.world_size()
        for line in overview(cfg, self.inputs, self.device, ranks, self.directory):
            logger.info(line)
        for note in self.notes:
            logger.info(f"note: {note}")
        log.report_to(cfg.logging, asdict(cfg), self.step)
        log.show()
        distributed.seed_everything(cfg.seed)
        self._load()
        self._between_steps()
        if self.resumed is None and cfg.eval.before:
            self._evaluate(BEFORE)
        log.start(self.step)
        with self.interrupt.armed():
            try:
                if self.evaluated < self.step:  # interrupted before the evaluation ended
                    self._after_step()
                while not self._stopping() and self.step < cfg.steps:
                    hang_watchdog.beat(step=self.step + 1)
                    rollouts, sampled = self._rollouts()
                    with self.interrupt.deferred():
                        metrics = self._update(rollouts) | sampled
                        self.step += 1
                        log.step(self.step, metrics)
                        self._between_steps()
                    self._heed(self.watchdog.look(self.step, metrics))
                    self._after_step()
            except KeyboardInterrupt:
                if self.interrupt.aborted:
                    raise
                self.stopped_by = self.interrupt.signum
            if self.stopped_by is not None:
                return self._finish(self._last_checkpoint("interrupted"))
            try:
                with self.interrupt.deferred():
                    student = self._save(self.directory / "student")
            except KeyboardInterrupt:
                if self.interrupt.aborted:
                    raise
            if cfg.eval.sets and self._stopping():
                return self._finish(self._last_checkpoint("interrupted"))
        if self._evaluate(AFTER):
            self._checkpoint()
        self.checkpoints.finish()
        return self._finish(student)

    def _rollouts(self) -> tuple[list[Rollout], dict[str, Any]]:
        """Return this rank's rollouts of the next step, and metrics. Collective."""
        self._settle()
        with self._engine_needed():
            return self.rollouts.take(self.step)

    def _settle(self) -> None:
        """Wait for responses that are being sampled; a signal takes effect after that."""
        with self._engine_needed(), self.interrupt.deferred():
            self.rollouts.settle(self.step)

    def _update(self, rollouts: list[Rollout]) -> dict[str, Any]:
        """Make one optimizer step on the rollouts and return its metrics."""
        try:
            metrics = self.update(rollouts, self.step)
        except NotFinite as error:
            if not error.weights:
                self._stop(str(error), error)
            last = self.checkpoints.finish()
            raise TrainingStopped(f"{error} The last complete checkpoint is {last}") from error
        delta = metrics.get("mem/actor_update_delta_peak_GB")
        if delta is not None:
            self.delta_peak_gb = max(self.delta_peak_gb or 0.0, delta)
        return metrics

    @contextlib.contextmanager
    def _synced(self, engine: Engine) -> Iterator[None]:
        """Return a context in which an evaluation samples with the student's current weights."""
        self._settle()
        with self._engine_needed(), self.rollouts.synced(engine, self.step):
            yield

    @contextlib.contextmanager
    def _engine_needed(self) -> Iterator[None]:
        """Return a context in which a failure of the engine ends the run."""
        try:
            yield
        except EngineFailure as error:
            self._stop(str(error), error)

    def _stop(self, why: str, cause: Exception | None = None) -> NoReturn:
        """Write a checkpoint of the state after the last step and raise `TrainingStopped`."""
        with contextlib.suppress(EngineFailure):
            self.rollouts.settle(self.step)
        self.engine.close()
        path = self._last_checkpoint(why)
        raise TrainingStopped(f"{why}. The state after step {self.step} is in {path}") from cause

    def _load(self) -> None:
        cfg = self.cfg
        recomputed, notes = choose_blocks(cfg, self.device, self.inputs.bridge_ranks)
        for note in notes:
            logger.info(f"note: {note}")
        with self.timer("loading"):
            builder = Builder(cfg, self.device, recomputed, self.inputs)
        self.student = builder.student
        check_space(cfg, self.directory, self.student)
        for name in cfg.all_teachers if cfg.eval.teacher else ():
            subject = Subject.of_teacher(name)
            if self.evaluator.is_done(subject):
                continue
            with self.timer("loading"):
                model = builder.whole_teacher(name)
            self.evaluator(subject, self.step, model)
            del model
        with self.timer("loading"):
            objectives = builder.objectives(self.inputs.shared_ids)
            with self._autocast():
                objectives.check_models()
                if cfg.packing:
                    objectives.check_packing()
        self.update = StudentUpdate(
            cfg,
            self.inputs,
            self.student,
            objectives,
            sharded=builder.mesh is not None,
            recomputed=builder.recomputed,
            timer=self.timer,
            autocast=self._autocast,
            directory=self.directory,
            device=self.device,
        )
        self.checkpoints = RunCheckpoints(
            cfg, self.directory, self.student, self.tokenizer, self.device, self.resumed
        )
        self.closing.callback(self.checkpoints.close)
        if self.resumed is not None:
            with self.timer("loading"):
                self.checkpoints.load(self.update.optimizer)
            fast_forward(self.update.scheduler, self.step)
        self.closing.enter_context(cores_shared(cfg, self.device))
        with self.timer("loading"):
            try:
                self.engine = make_engine(
                    cfg,
                    self.student,
                    self.tokenizer,
                    self.device,
                    self.directory,
                    self._autocast,
                )
            except EngineFailure as error:
                raise TrainingStopped(f"{error}\nNothing was trained") from error
        self.closing.callback(self.engine.close)
        self.rollouts = Rollouts(
            cfg, self.inputs, self.student, self.engine, self.batches, self.timer, self._autocast
        )
        if self.resumed is not None:
            self.rollouts.restore(self.step, self.checkpoints.saved_rollouts())
        self.timer.take_step()

    def _recall(self, document: dict[str, Any]) -> None:
        """Restore the parts of a checkpoint that are in its JSON document."""
        self.step, self.delta_peak_gb = document["step"], document["delta_peak_gb"]
        self.batches.load_state_dict(document["sampler"])
        self.timer.total.update(document["seconds"])
        self.watchdog.load_state_dict(document["watchdog"])
        self.evaluated = document.get("evaluated", self.step)
        evaluations = document["evaluations"]
        if evaluations and not resume.same_evaluation(document["settings"], self.cfg):
            self.notes.append(f"evaluated with other settings, left out: {', '.join(evaluations)}")
        else:
            self.evaluator.recall(evaluations, finished=self.step == self.cfg.steps)

    def _between_steps(self) -> None:
        """Capture sampler and random states for a checkpoint; the next rollout changes them."""
        self.rollouts.snapshot()
        self.random_state = rng.capture(self.device)

    def _stopping(self) -> bool:
        """Return whether a rank has received a signal to end the run. Collective."""
        signum = distributed.max_over_ranks(float(self.interrupt.signum or 0), self.device)
        self.stopped_by = int(signum) or None
        return self.stopped_by is not None

    def _checkpoint(self) -> None:
        """Start writing a checkpoint of the state after the last step."""
        with self._engine_needed():
            self.rollouts.settle(self.step)
        progress = {
            "sampler": self.rollouts.position,
            "evaluations": plain(self.evaluator.results),
            "seconds": dict(self.timer.total),
            "delta_peak_gb": self.delta_peak_gb,
            "watchdog": self.watchdog.state_dict(),
            "metrics_bytes": self.log.position(),
            "evaluated": self.evaluated,
        }
        with self.timer("saving"):
            random, ahead = self.random_state, self.rollouts.saved(self.step)
            self.checkpoints.save(self.step, self.update.optimizer, random, ahead, progress)
        self.timer.drop_step()

    def _last_checkpoint(self, why: str) -> Path:
        """Write a checkpoint, wait until it is complete and return its path."""
        if self.rollouts.is_pending(self.step):
            logger.info(
                f"the responses of step {self.step + 1} are being sampled, and the checkpoint waits"
                " for them"
            )
        self._checkpoint()
        with self.timer("saving"):
            path = self.checkpoints.finish()
        self.timer.take_step()
        if self.checkpoints.failure is not None or path is None:
            raise TrainingStopped(
                f"{why} after step {self.step}: {self.checkpoints.failure}. The last complete "
                f"checkpoint is {path}"
            )
        return path

    def _heed(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            if alarm.stop:
                self._stop(alarm.message)
            logger.warning(alarm.message)

    def _after_step(self) -> None:
        """Evaluate and write a checkpoint if they are due after this step."""
        sets = self.evaluator.due(self.step, self.cfg.steps)
        best = self._evaluate(DURING, sets)
        self.evaluated = self.step
        with self.interrupt.deferred():
            if best or self.checkpoints.due(self.step):
                self._checkpoint()
            self.checkpoints.poll()

    def _evaluate(self, subject: Subject, sets: list[str] | None = None) -> bool:
        """Evaluate the student; return whether its ``keep_best`` metric is the best so far."""
        metrics = self.evaluator(subject, self.step, self.student, self.engine, sets)
        return subject.may_be_best and self.checkpoints.observe(self.step, metrics)

    def _save(self, directory: Path) -> Path:
        with self.timer("saving"):
            try:
                save_student(self.student, self.tokenizer, directory)
            except (OSError, SafetensorError) as error:
                last = self.checkpoints.finish()
                raise TrainingStopped(
                    f"the student of step {self.step} could not be written to {directory}: {error}."
                    f" The last complete checkpoint is {last}"
                ) from error
        self.timer.take_step()
        return directory

    def _finish(self, student: Path) -> Summary:
        summary = Summary(
            self.directory,
            student,
            self.step,
            self.stopped_by is not None,
            self.evaluator.results,
            dict(self.timer.total),
            self.delta_peak_gb,
            self.stopped_by,
        )
        if distributed.rank() == 0:
            write_summary(summary)
            self.log.closing(summary, [t.path for t in self.cfg.all_teachers.values()])
        self.log.close()
        return summary


@shown()
def train(cfg: TrainConfig) -> Summary:
    """Run the training that ``cfg`` describes.

    Returns:
        The summary of the run. With ``resume="auto"``, a finished run is not repeated; its summary
        is returned.

    Raises:
        ConfigError: before models are loaded, if a check of the configuration fails.
        TrainingStopped: if the run can't continue. Its state is saved if that is possible.
    """
    inputs = preflight(cfg)
    if cfg.resume == "auto" and (done := done_already(cfg, output_dir(cfg))) is not None:
        return done
    joined_by_caller = distributed.joined()
    try:
        trainer = Trainer(cfg, inputs)
        if distributed.rank() == 0:
            resume.write_config(trainer.directory, cfg)
        with trainer.closing, hang_watchdog.watching(cfg.watchdog.timeout_s, trainer.directory):
            summary = trainer.run()
            distributed.wait_for_all()  # gloo may abort a rank if others exit first
            return summary
    finally:
        if not joined_by_caller:
            distributed.shutdown()

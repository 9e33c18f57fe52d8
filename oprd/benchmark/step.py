"""``oprd-gains --step``: whole training steps, objective against objective on the same prompts.

Every objective is trained by ``oprd-train``'s own trainer, from the same student, with the same
prompts and seed. Three ways of counting are measured, since each answers another question:

- the update alone, on the same rollouts for all objectives;
- the step at equal lengths: teacher and update on these rollouts, and what the rest of a step takes
  where they are sampled;
- the step at each objective's own lengths, as it trains.

The same rollouts are those that the student samples in OPRD's measured steps of the first round.
Each run replays them after its own steps. Rounds go through the objectives in turns, there and
back (A B C, C B A), so that a machine that slows down steadily favours none.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from oprd import distributed
from oprd.benchmark import step_report, step_tables
from oprd.benchmark.step_config import StepConfig
from oprd.benchmark.step_flops import measured_peak
from oprd.benchmark.step_plan import Prepared, check_memory, prepare
from oprd.benchmark.step_trainer import Measured, MeasuredTrainer
from oprd.config import TrainConfig
from oprd.data.rollout import Rollout
from oprd.distributed.device import check_device
from oprd.observability.console import LOGGER
from oprd.observability.tables import show
from oprd.output_paths import check_output_dir
from oprd.training.evaluator import AFTER

logger = logging.getLogger(__name__)


def measure(
    rows: Sequence[Prepared],
    step: StepConfig,
    device: torch.device,
    directory: Path,
    console: Console,
) -> dict[str, Measured]:
    """Measure every row in rounds, there and back.

    Args:
        directory: an existing directory for the runs' files, which are not kept.
        console: where it says what it measures.
    """
    measured = {row.name: Measured() for row in rows}
    shared: list[list[Rollout]] = []
    for round_ in range(step.rounds):
        for row in rows if round_ % 2 == 0 else rows[::-1]:
            console.print(f"round {round_ + 1} of {step.rounds}: {row.title}", markup=False)
            cfg = copy.deepcopy(row.cfg)
            cfg.output_dir = str(directory / f"{row.name}_{round_ + 1}")
            _run(row, cfg, step, measured[row.name], shared, round_ == step.rounds - 1)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return measured


def _run(
    row: Prepared,
    cfg: TrainConfig,
    step: StepConfig,
    measured: Measured,
    shared: list[list[Rollout]],
    is_last: bool,
) -> None:
    """Run one row once. Fills ``shared`` with its rollouts if that is empty."""
    total = step.warmup + step.steps
    cfg.steps = max(cfg.steps, total)
    trainer = MeasuredTrainer(cfg, row.inputs, total, step.evaluate and is_last)
    with trainer.closing:
        summary = trainer.run()
        measured.own.append(trainer.steps[step.warmup :])
        if not shared:
            shared += trainer.sampled[step.warmup :]
        measured.equal.append(trainer.replay(shared))
        if is_last:
            measured.idle = _extra("idle share", trainer.idle) or (None, None)
            measured.timeline = _extra("memory over time", lambda: trainer.timeline(shared[0]))
            measured.recomputed = trainer.update.recomputed
            measured.accuracy = dict(summary.evaluations.get(AFTER.label, {}))


T = TypeVar("T")


def _extra(what: str, measure: Callable[[], T]) -> T | None:
    """Return a measurement, or None with a warning if it fails: the rest is not lost for it.

    It reads records of torch that have no stable interface.
    """
    try:
        return measure()
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        logger.warning(f"{what}: not measured, {type(error).__name__}: {error}")
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show warnings, and what takes long, on stderr; nothing of the runs on stdout."""
    slow = logging.getLogger("oprd.observability.progress")
    handlers, level = LOGGER.handlers[:], LOGGER.level
    there = logging.StreamHandler()
    LOGGER.handlers[:] = [there]
    LOGGER.setLevel(logging.WARNING)
    slow.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.handlers[:] = handlers
        LOGGER.setLevel(level)
        slow.setLevel(logging.NOTSET)


def run_step(
    run: TrainConfig, step: StepConfig, command: str, dry_run: bool, as_json: bool
) -> dict[str, Any] | None:
    """Predict, and unless ``dry_run`` also measure; print tables or JSON, and return the report.

    Args:
        run: the training run. Its ``output_dir`` is where the caller writes the report.
        command: the command line, for the report.

    Returns:
        None after a dry run.

    Raises:
        ConfigError: if anything is wrong, or memory too small, before weights are loaded.
        TrainingStopped: if a run can't go on.
    """
    console = Console(highlight=False)
    if run.output_dir is not None:
        check_output_dir(run.output_dir, step_report.FILES)
    rows = prepare(run, step, dry_run)
    device = check_device(run.device)
    if dry_run:
        predicted = step_report.predictions(rows, command, device)
        if as_json:
            print(json.dumps(predicted, indent=1))
        else:
            show(console, [step_tables.prediction_table(predicted)])
        return None
    check_memory(rows, device)
    peak = measured_peak(device, step_report.product_dtype(rows[0].cfg))
    stderr = Console(stderr=True, highlight=False)
    joined_by_caller = distributed.joined()
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="oprd-gains-") as directory:
            measured = measure(rows, step, device, Path(directory), stderr)
    finally:
        if not joined_by_caller:
            distributed.shutdown()
    report = step_report.make_report(rows, step, measured, command, device, peak)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show(console, step_tables.tables(report))
    return report

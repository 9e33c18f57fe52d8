"""What ``oprd-scaling`` shows and writes: tables with their assumptions, JSON and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_json
from oprd.benchmark.scaling import Predicted, Scaling, Traffic, predict
from oprd.benchmark.scaling_config import SOURCES, LinkConfig, ScalingConfig
from oprd.benchmark.scaling_inputs import Source, read
from oprd.errors import ConfigError
from oprd.observability.memory import GIB
from oprd.observability.tables import TextTable
from oprd.output_paths import check_output_dir
from oprd.report.chart import Line, LineChart, StackedBars
from oprd.report.png import write_png

FILES = ("scaling.json", "scaling_time.png", "scaling_efficiency.png")
WIDTH = 80
MEANING: dict[Scaling, str] = {
    "weak": "weak scaling: the measured sequences on every GPU",
    "strong": "strong scaling: the measured batch, spread over the GPUs",
}
PARTS = {
    "rollout": "rollout",
    "sync": "weight sync",
    "teacher": "teacher",
    "update": "student update",
    "waiting": "waiting for links",
    "optimizer": "optimizer",
}
"""Names of the parts of a step, by field of `Predicted`."""
HEADS = {
    "rollout": "rollout\ns",
    "sync": "weight\nsync s",
    "teacher": "teacher\ns",
    "update": "student\nupdate s",
    "waiting": "wait for\nlinks s",
    "optimizer": "optim.\ns",
}
MEANINGS = (
    "wait for links: of the teacher's and student's passes; % a GPU: sampled tokens/s of one GPU, "
    "of the first row's"
)
PLANNED = "; GiB: of the memory plan"
LEFT_OUT = (
    "left out: sequences of unequal length (ranks wait for the longest), smaller batches being "
    "less efficient, links shared with others, host work, offloaded shards, evaluation, checkpoints"
)


@dataclass(frozen=True)
class Prediction:
    """Steps on each number of GPUs, and what they were predicted from.

    Attributes:
        steps: by scaling, in the order of `ScalingConfig.gpus`.
        memory: bytes that the memory plan says each GPU needs, in the same order; None: no plan.
    """

    cfg: ScalingConfig
    source: Source
    steps: dict[Scaling, list[Predicted]]
    memory: dict[Scaling, list[int | None]]


def make_prediction(cfg: ScalingConfig) -> Prediction:
    """Read what was measured and predict every step.

    Raises:
        ConfigError: for wrong options, or if what was measured can't be read.
    """
    cfg.check()
    if cfg.output_dir is not None:
        check_output_dir(cfg.output_dir, FILES)
    source = read(Path(cfg.measured), cfg.objective, cfg.gradient_checkpointing)
    shard_size = source.model.shard_size
    odd = [n for n in cfg.gpus if shard_size and n > shard_size and n % shard_size]
    if odd:
        raise ConfigError(
            f"gpus {', '.join(map(str, odd))}: the run's fsdp.shard_size of {shard_size} does not "
            "divide them"
        )
    machine, steps, memory = cfg.links.machine(), {}, {}
    for scaling in source.scalings:
        steps[scaling] = [
            predict(source.model, machine, n, scaling, cfg.throughput) for n in cfg.gpus
        ]
        memory[scaling] = [source.memory(p.ranks, p.sequences * p.ranks) for p in steps[scaling]]
    return Prediction(cfg, source, steps, memory)


def tables(made: Prediction) -> list[TextTable]:
    """Make a table for each scaling, and the table of what both assume."""
    shown: list[TextTable] = []
    for scaling, steps in made.steps.items():
        columns: dict[str, list[str]] = {
            "GPUs": [str(p.ranks) for p in steps],
            "seq.\na GPU": [str(p.sequences) for p in steps],
        }
        for part, head in HEADS.items():
            if any(getattr(p, part) is not None for p in steps):
                columns[head] = [_seconds(getattr(p, part)) for p in steps]
        columns["step\ns"] = [_seconds(p.step) for p in steps]
        columns["tokens\n/s"] = [f"{p.tokens_per_second:,.0f}" for p in steps]
        columns["% a\nGPU"] = [f"{100 * e:.0f}" for e in efficiency(steps)]
        if None not in made.memory[scaling]:
            columns["GiB\na GPU"] = [f"{(m or 0) / GIB:.1f}" for m in made.memory[scaling]]
        rows = list(zip(*columns.values(), strict=True))
        title = f"a PREDICTION, {MEANING[scaling]}"
        notes = [MEANINGS + ("" if None in made.memory[scaling] else PLANNED)]
        if idle := [
            p.ranks for p in steps if p.tokens < p.ranks * made.source.model.measured.tokens
        ]:
            notes.append(
                f"On {', '.join(map(str, idle))} GPUs some have no sequence: oprd-train asks for "
                "more prompts (rollout.prompts_per_step)."
            )
        shown += TextTable(title, list(columns), rows, notes).parts(WIDTH)
    return [*shown, assumptions(made)]


def efficiency(steps: Sequence[Predicted]) -> list[float]:
    """Return the tokens a second of a GPU, as shares of those in the first of the steps."""
    first = steps[0].tokens_per_second / steps[0].ranks
    return [p.tokens_per_second / p.ranks / first for p in steps]


def assumptions(made: Prediction) -> TextTable:
    """Make the table of everything that the prediction takes for granted."""
    cfg, model = made.cfg, made.source.model
    rows: list[tuple[str, ...]] = [*made.source.about]
    rows += [
        ("the student sends", _sent(model.student)),
        ("the teacher sends", _sent(model.teacher)),
        ("forward", f"{model.measured.forward_share:.0%} of the update's computation"),
        ("blocks", "compute equally long; a collective hides behind the block beside it"),
    ]
    usual = LinkConfig()
    for name, source in SOURCES.items():
        value = getattr(cfg.links, name)
        given = "" if value == getattr(usual, name) else ", given"
        rows.append((f"links.{name}", f"{value:g} ({source if not given else 'given'})"))
    rates = cfg.throughput
    if rates is None:
        rows.append(("rollouts", "left out: give rollout_tokens_per_second"))
    else:
        alone = "no limit" if rates.sequence is None else f"{rates.sequence:,g}"
        told = f"{rates.gpu:,g} tokens/s a GPU, {alone} a sequence: given, not measured here"
        if model.samples_beside:
            told += "; beside the training (rollout.staleness), on GPUs of their own"
        rows.append(("rollouts", told))
    return TextTable("what is assumed", ("", ""), rows, [LEFT_OUT], left=(0, 1))


def _sent(t: Traffic) -> str:
    if not t.is_sharded:
        gradients = t.blocks * t.block_gradients + t.root_gradients
        return "nothing" if not gradients else f"{_mib(gradients)} MiB of gradients, once a step"
    times = "twice" if t.again and t.block_gradients else "once"
    words = (
        f"a micro-batch: {t.blocks} x {_mib(t.block)} MiB of weights {times}, {_mib(t.root)} MiB "
        "of embeddings"
    )
    if t.block_gradients:
        words += (
            f"; {t.blocks} x {_mib(t.block_gradients)} + {_mib(t.root_gradients)} MiB of gradients"
        )
    return words


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def as_json(made: Prediction, command: str) -> dict[str, Any]:
    """Return the prediction as plain values; times in seconds, sizes in bytes."""
    model = made.source.model
    return {
        "command": command,
        "what": "a prediction: nothing here was measured on these numbers of GPUs",
        "config": asdict(made.cfg),
        "measured": asdict(model.measured),
        "traffic": {"student": asdict(model.student), "teacher": asdict(model.teacher)},
        "shard_size": model.shard_size,
        "steps": {
            scaling: [
                asdict(p) | {"step": p.step, "tokens_per_second": p.tokens_per_second, "memory": m}
                for p, m in zip(steps, made.memory[scaling], strict=True)
            ]
            for scaling, steps in made.steps.items()
        },
    }


def write(made: Prediction, command: str) -> None:
    """Write `FILES` to ``output_dir``, if there is one."""
    if made.cfg.output_dir is None:
        return
    directory = Path(made.cfg.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    document, bars, lines = (directory / name for name in FILES)
    write_json(document, as_json(made, command))
    write_png(time_chart(made), bars)
    write_png(efficiency_chart(made), lines)


def time_chart(made: Prediction) -> StackedBars:
    """Make the chart of a step's seconds by part."""
    every = [(scaling, p) for scaling, steps in made.steps.items() for p in steps]
    parts = {
        name: [getattr(p, part) or 0.0 for _, p in every]
        for part, name in PARTS.items()
        if any(getattr(p, part) is not None for _, p in every)
    }
    return StackedBars(
        "scaling_time", "", "Predicted seconds of a step", "seconds (predicted)", "",
        labels=[f"{p.ranks} GPU{'s' * (p.ranks > 1)}, {scaling}" for scaling, p in every],
        parts=parts,
    )  # fmt: skip


def efficiency_chart(made: Prediction) -> LineChart:
    """Make the chart of the tokens a second of a GPU over the number of GPUs."""
    lines = [
        Line(f"{scaling} scaling", i, [float(p.ranks) for p in steps],
             [100 * e for e in efficiency(steps)], steps=len(steps))
        for i, (scaling, steps) in enumerate(made.steps.items())
    ]  # fmt: skip
    return LineChart(
        "scaling_efficiency", "", "Predicted tokens a second of a GPU", "GPUs",
        "% of the first (predicted)", lines=lines, x_log=True, markers=True,
    )  # fmt: skip

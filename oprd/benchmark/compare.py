"""``oprd-compare``: train with several objectives from the same student, prompts and seeds.

    oprd-compare [--config recipes/compare_demo.yaml] [--seeds '[0, 1, 2]'] [--output_dir ..]

Every objective's learning rate is chosen from the same grid, by validation accuracy with a separate
seed. Then each objective is run with every seed. A run that has finished is read, not repeated, so
that an interrupted comparison can be continued.
"""

from __future__ import annotations

import copy
import json
import signal
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_figure, write_json, write_whole
from oprd.config import BridgeConfig, OpdConfig, TrainConfig
from oprd.config.demo import demo_config
from oprd.distill.objectives import REP
from oprd.errors import ConfigError, Problems
from oprd.observability.console import console
from oprd.observability.memory import GIB
from oprd.observability.signals import Interrupted
from oprd.observability.summary import SUMMARY, Summary
from oprd.observability.tables import TextTable, show
from oprd.output_paths import check_output_dir
from oprd.training.trainer import train

PHASES = ("rollout", "teacher", "student update")
TEACHER = "teacher"
"""Directory of the run that evaluates the teacher."""
LONGEST_NAME = 200
"""Bytes of the name of a variant's directory."""


@dataclass
class Variant:
    """One way to train.

    Attributes:
        objectives: weights of the objectives, as in `TrainConfig.objectives`.
        opd: settings of the output-space losses.
    """

    objectives: dict[str, float]
    opd: OpdConfig = field(default_factory=OpdConfig)


def demo_variants() -> dict[str, Variant]:
    """Return the variants that are compared on the demo."""
    return {
        "OPD top-1": Variant({"opd_top1": 1.0}),
        "OPD top-4": Variant({"opd_topk": 1.0}, OpdConfig(k=4)),
        "OPD full": Variant({"opd_full": 1.0}),
        "OPRD": Variant({"oprd": 1.0}),
        "OPD top-1 + 10 OPRD": Variant({"opd_top1": 1.0, "oprd": 10.0}),
    }


@dataclass
class CompareConfig:
    """A comparison. The defaults are those of the demo.

    Attributes:
        output_dir: directory for the table, the figure and one directory per run.
        variants: the variants to compare, by name.
        learning_rates: learning rates to choose from for each variant.
        tuning_seed: seed of the runs that choose the learning rate.
        seeds: seeds of the reported runs.
        selection_set: evaluation set for choosing learning rates and measuring progress.
        report_set: evaluation set whose accuracy is reported.
        target: share of the teacher's accuracy; the steps and seconds to reach it are reported.
        run: settings that all runs share.
    """

    output_dir: str = "runs/compare"
    variants: dict[str, Variant] = field(default_factory=demo_variants)
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3])
    tuning_seed: int = 100
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    selection_set: str = "val"
    report_set: str = "test"
    target: float = 0.95
    run: TrainConfig = field(default_factory=demo_config)

    @property
    def metric(self) -> str:
        """The name of the accuracy in tables, figures and ``metrics.jsonl``."""
        return f"avg@{self.run.eval.samples}"


@dataclass(frozen=True)
class Result:
    """The results of one run.

    Attributes:
        curve: (step, seconds of training so far, accuracy on the selection set) of each evaluation.
        accuracy: final accuracy (avg@k) on the report set.
        seconds: seconds by phase.
        delta_peak: peak memory of the student's update in GiB, None if not measured.
        tokens_per_second: tokens per second of training.
    """

    curve: list[tuple[int, float, float]]
    accuracy: float
    seconds: dict[str, float]
    delta_peak: float | None
    tokens_per_second: float

    def reached(self, accuracy: float) -> tuple[int, float] | None:
        """Return step and training seconds of the first evaluation with at least ``accuracy``."""
        return next(((step, s) for step, s, a in self.curve if a >= accuracy), None)


def check(cfg: CompareConfig) -> None:
    """Check the settings of the comparison itself.

    Raises:
        ConfigError: if any is wrong; the message lists all problems.
    """
    problems = Problems()
    need, sets = problems.need, cfg.run.eval.sets
    for name in sorted({cfg.selection_set, cfg.report_set}):
        need(name in sets, f"run.eval.sets has no {name!r}, only {[*sets]}")
    need(
        cfg.selection_set not in sets or sets[cfg.selection_set].every != 0,
        f"run.eval.sets.{cfg.selection_set}.every is 0, but progress is measured on this set: "
        "set the steps between evaluations",
    )
    lists: dict[str, list[Any]] = {"learning_rates": cfg.learning_rates, "seeds": cfg.seeds}
    for name, values in lists.items():
        need(
            len(values) > 0 and len(set(values)) == len(values),
            f"{name} must be distinct values, at least one, got {values}",
        )
    need(len(cfg.variants) > 0, "variants is empty: name at least one")
    _check_directories(problems, cfg.variants)
    need(0 < cfg.target <= 1, f"target must lie in (0, 1], got {cfg.target}")
    need(
        cfg.run.output_dir is None,
        "run.output_dir is set: leave it out, since runs are written to output_dir",
    )
    problems.refuse()


def _check_directories(problems: Problems, names: Iterable[str]) -> None:
    """Check that the directories of variants are distinct, on any file system."""
    taken = {TEACHER: "the teacher"}
    for name in names:
        directory = _slug(name)
        problems.need(
            0 < len(directory.encode()) <= LONGEST_NAME,
            f"variants: {name!r} can't name a directory: give it 1 to {LONGEST_NAME} bytes",
        )
        other = taken.setdefault(directory.lower(), repr(name))
        problems.need(
            other == repr(name),
            f"variants: the runs of {name!r} and of {other} would share the directory "
            f"{directory}: rename one",
        )


class Comparison:
    """The runs of a `CompareConfig`, and their report."""

    def __init__(self, cfg: CompareConfig) -> None:
        check(cfg)
        self.cfg, self.directory = cfg, Path(cfg.output_dir)
        self.console = console

    def run(self) -> dict[str, Any]:
        """Do the missing runs, and write ``compare.json``, ``compare.md`` and ``compare.png``."""
        cfg = self.cfg
        self._keep_config()
        teacher = self._teacher_accuracy()
        rates = {name: self._best_rate(name) for name in cfg.variants}
        results = {
            name: [self._result(name, rates[name], seed) for seed in cfg.seeds]
            for name in cfg.variants
        }
        report = summarise(cfg, teacher, rates, results)
        write_json(self.directory / "compare.json", report)
        write_whole(self.directory / "compare.md", markdown(cfg, report) + "\n")
        plot(cfg, teacher[cfg.selection_set], results, self.directory / "compare.png")
        show(self.console, screen(cfg, report))
        console.print(f"report: {self.directory}/compare.md, compare.json and compare.png")
        return report

    def _keep_config(self) -> None:
        """Write the configuration; raise if the directory holds another comparison."""
        check_output_dir(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "config.json"
        values = json.loads(json.dumps(asdict(self.cfg)))
        # Variants, seeds and rates may be added later; other changes would mix unlike runs.
        ours = {k: v for k, v in values.items() if k not in ("learning_rates", "seeds")}
        if file.exists():
            theirs = json.loads(file.read_text())
            if "variants" not in theirs:
                raise ConfigError(
                    f"output_dir {self.directory} holds other files: choose a new directory"
                )
            variants = theirs["variants"] | ours["variants"]
            if theirs | {"variants": {}} != ours | {"variants": {}}:
                raise ConfigError(
                    f"output_dir {self.directory} holds a comparison with other settings (see "
                    "config.json in it): choose a new directory"
                )
            changed = [n for n, v in theirs["variants"].items() if ours["variants"].get(n, v) != v]
            if changed:
                raise ConfigError(
                    f"output_dir {self.directory} holds runs of other variants called {changed}: "
                    "give yours other names, or choose a new directory"
                )
            ours["variants"] = variants
            problems = Problems()
            _check_directories(problems, variants)
            problems.refuse()
        write_json(file, ours)

    def _teacher_accuracy(self) -> dict[str, float]:
        file = self.directory / "teacher.json"
        if not file.exists():
            run = copy.deepcopy(self.cfg.run)
            run.output_dir, run.steps = str(_free(self.directory / TEACHER)), 1
            run.eval.teacher = True
            summary = _train(run)
            accuracy = {n: r.avg for n, r in summary.evaluations["teacher"].items()}
            write_json(file, accuracy)
        return json.loads(file.read_text())

    def _best_rate(self, name: str) -> float:
        """Return the rate with the best last accuracy on the selection set, the lowest in a tie."""
        accuracy = {
            lr: self._result(name, lr, self.cfg.tuning_seed).curve[-1][2]
            for lr in sorted(self.cfg.learning_rates)
        }
        return max(accuracy, key=lambda lr: accuracy[lr])

    def _result(self, name: str, lr: float, seed: int) -> Result:
        directory = self.directory / _slug(name) / f"lr_{lr:g}_seed_{seed}"
        if not (directory / SUMMARY).exists():
            variant = self.cfg.variants[name]
            run = copy.deepcopy(self.cfg.run)
            run.name, run.seed, run.optim.lr = f"{name}, lr {lr:g}, seed {seed}", seed, lr
            run.objectives, run.opd = dict(variant.objectives), variant.opd
            if REP not in variant.objectives:
                run.bridge = BridgeConfig()  # a run with an unused bridge is refused
            run.eval.teacher = False
            run.output_dir = str(_free(directory))
            self.console.print(f"\n== {run.name}", markup=False)
            _train(run)
        return read_result(directory, self.cfg)


def _train(run: TrainConfig) -> Summary:
    """Train; raise `Interrupted` if a signal ended the run, which then counts as unfinished."""
    summary = train(run)
    if summary.interrupted:
        (summary.directory / SUMMARY).unlink()
        raise Interrupted(summary.stopped_by or signal.SIGINT)
    return summary


def _free(directory: Path) -> Path:
    """Rename what an unfinished run left at ``directory``, and return ``directory``."""
    if directory.exists():
        n = 1
        while (aside := directory.with_name(f"{directory.name}.unfinished_{n}")).exists():
            n += 1
        directory.rename(aside)
    return directory


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def read_result(directory: Path, cfg: CompareConfig) -> Result:
    """Read the results of a finished run of a comparison from its files."""
    summary = json.loads((directory / SUMMARY).read_text())
    curve: list[tuple[int, float, float]] = []
    seconds = 0.0
    tokens, token_seconds = 0.0, 0.0
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if "actor/grad_norm" in metrics:
            spent = sum(metrics[f"time/{phase.replace(' ', '_')}_s"] for phase in PHASES)
            seconds += spent
            tokens += metrics["perf/tokens_per_second"] * spent
            token_seconds += spent
        elif (accuracy := metrics.get(f"val/{cfg.selection_set}/{cfg.metric}")) is not None:
            curve.append((metrics["step"], seconds, accuracy))
    return Result(
        curve=curve,
        accuracy=summary["evaluations"]["student after"][cfg.report_set]["avg"],
        seconds={phase: summary["seconds"].get(phase, 0.0) for phase in PHASES},
        delta_peak=summary["mem/actor_update_delta_peak_GB"],
        tokens_per_second=tokens / token_seconds if token_seconds else 0.0,
    )


def summarise(
    cfg: CompareConfig,
    teacher: dict[str, float],
    rates: dict[str, float],
    results: dict[str, list[Result]],
) -> dict[str, Any]:
    """Compute means and standard deviations over seeds, by variant."""
    target = cfg.target * teacher[cfg.selection_set]
    variants = {}
    for name, runs in results.items():
        accuracies = [r.accuracy for r in runs]
        reached = [hit for r in runs if (hit := r.reached(target))]
        peaks = [r.delta_peak for r in runs if r.delta_peak is not None]
        variants[name] = {
            "lr": rates[name],
            "accuracy": accuracies,
            "accuracy_mean": statistics.mean(accuracies),
            "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "seconds": {p: statistics.mean(r.seconds[p] for r in runs) for p in PHASES},
            "delta_peak_GB": max(peaks) if peaks else None,
            "tokens_per_second": statistics.mean(r.tokens_per_second for r in runs),
            "reached": len(reached),
            "steps_to_target": statistics.mean(s for s, _ in reached) if reached else None,
            "seconds_to_target": statistics.mean(s for _, s in reached) if reached else None,
        }
    return {
        "metric": cfg.metric,
        "teacher": teacher,
        "target_accuracy": target,
        "variants": variants,
    }


def about(cfg: CompareConfig, report: dict[str, Any]) -> str:
    """Say how the numbers of a report were made."""
    return (
        f"{cfg.run.steps} steps, seeds {cfg.seeds}; learning rate of each chosen from "
        f"{cfg.learning_rates} by {cfg.metric} on {cfg.selection_set} with seed {cfg.tuning_seed}. "
        f"Teacher: {report['teacher'][cfg.report_set]:.4f} on {cfg.report_set}. Target: "
        f"{cfg.target:.0%} of the teacher's {cfg.metric} on {cfg.selection_set}, evaluated every "
        f"{cfg.run.eval.sets[cfg.selection_set].every} steps; seconds count training only."
    )


def cells(cfg: CompareConfig, report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Format the report's numbers, by variant and then by the column's name."""

    def row(v: dict[str, Any]) -> dict[str, str]:
        peak, steps, seconds = v["delta_peak_GB"], v["steps_to_target"], v["seconds_to_target"]
        return {
            "lr": f"{v['lr']:g}",
            "accuracy": f"{v['accuracy_mean']:.4f} ± {v['accuracy_std']:.4f}",
            **{phase: f"{v['seconds'][phase]:.1f}" for phase in PHASES},
            "delta-peak": "-" if peak is None else f"{peak * GIB / 2**20:.1f}",
            "tokens/s": f"{v['tokens_per_second']:.0f}",
            "at target": f"{v['reached']}/{len(cfg.seeds)}",
            "steps": "-" if steps is None else f"{steps:.0f}",
            "seconds": "-" if seconds is None else f"{seconds:.1f}",
        }

    return {name: row(v) for name, v in report["variants"].items()}


def markdown(cfg: CompareConfig, report: dict[str, Any]) -> str:
    """Format the report as a Markdown table."""
    lines = [
        about(cfg, report),
        "",
        f"| objective | lr | {cfg.report_set} {cfg.metric}, mean ± std | rollout s | teacher s | "
        "student update s | delta-peak MiB | tokens/s | seeds at target | steps | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in cells(cfg, report).items():
        lines.append("| " + " | ".join([name, *row.values()]) + " |")
    return "\n".join(lines)


def screen(cfg: CompareConfig, report: dict[str, Any]) -> list[TextTable]:
    """Make the tables for the terminal: accuracy, and what it cost."""
    rows = cells(cfg, report)

    def pick(*names: str) -> list[list[str]]:
        return [[variant, *(row[name] for name in names)] for variant, row in rows.items()]

    return [
        TextTable(
            "accuracy",
            (
                "objective",
                "learning\nrate",
                f"{cfg.report_set}, {cfg.metric}\nmean ± std",
                "seeds at\ntarget",
                "steps to\ntarget",
                "seconds\nto target",
            ),
            pick("lr", "accuracy", "at target", "steps", "seconds"),
            [about(cfg, report)],
        ),
        TextTable(
            "cost of a run, mean over seeds",
            ("objective", "rollout\ns", "teacher\ns", "update\ns", "delta-peak\nMiB", "tokens/s"),
            pick(*PHASES, "delta-peak", "tokens/s"),
            ["delta-peak: memory that the student's update adds, the largest over seeds."],
        ),
    ]


def plot(cfg: CompareConfig, teacher: float, results: dict[str, list[Result]], path: Path) -> None:
    """Plot accuracy over steps and over seconds of training: means and ranges over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for name, runs in results.items():
        columns = list(zip(*(r.curve for r in runs), strict=False))  # one per evaluation
        accuracy = [[point[2] for point in column] for column in columns]
        mean = [statistics.mean(values) for values in accuracy]
        steps = [column[0][0] for column in columns]
        seconds = [statistics.mean(point[1] for point in column) for column in columns]
        for axis, xs in zip(axes, (steps, seconds), strict=True):
            (line,) = axis.plot(xs, mean, label=name)
            low, high = [min(v) for v in accuracy], [max(v) for v in accuracy]
            axis.fill_between(xs, low, high, alpha=0.15, color=line.get_color())
    for axis, label in zip(axes, ("step", "seconds of training"), strict=True):
        axis.axhline(teacher, color="black", linestyle=":", label="teacher")
        axis.set(xlabel=label)
    axes[0].set(ylabel=f"{cfg.metric} on {cfg.selection_set}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    write_figure(path, figure, dpi=110)
    plt.close(figure)

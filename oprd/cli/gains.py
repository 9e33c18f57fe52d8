"""``oprd-gains``: measure and predict what OPRD saves in the actor update, and in whole steps.

oprd-gains                                          # Qwen2.5-0.5B's shape, 384 tokens
oprd-gains --dry_run                                # only the prediction from shapes
oprd-gains --d 1536 --layers 28                     # heads and MLP follow from d
oprd-gains --dry_run --json | jq .modes             # for machines
oprd-gains --student.path ./student --objectives '[backbone,oprd,opd_topk]'
oprd-gains --step                                   # whole training steps of the demo
oprd-gains --step --config train.yaml --step.steps 8  # of your run; --step --help: its options
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from oprd.benchmark.config import GainsConfig
from oprd.benchmark.gains import run
from oprd.benchmark.step_config import StepConfig
from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import Parser, parse_run, run_command
from oprd.config import TrainConfig
from oprd.config.demo import demo_values

CONTROLS = ("config", "dry_run", "json", "step")
"""Options of ``--step`` that are not part of `TrainConfig`."""
DEMO_K = 4
"""Tokens in the demo's top-k losses, as in ``oprd-compare``: its vocabulary has only 15."""


def make_parser() -> Parser:
    """Return the parser of ``oprd-gains``."""
    parser = Parser(prog="oprd-gains", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "--step",
        action="store_true",
        help="measure whole training steps with real sampling instead: takes the options of "
        "oprd-train, and its own (--step --help)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only print the predictions, also for the paper's run; measure nothing",
    )
    _add_json(parser)
    parser.add_class_arguments(GainsConfig, None)
    return parser


def make_step_parser() -> Parser:
    """Return the parser of ``oprd-gains --step``."""
    parser = Parser(
        prog="oprd-gains --step",
        description="Measure whole training steps, objective against objective on the same "
        "prompts. Takes the options of oprd-train; without models of your own, those of the demo. "
        "output_dir is where the report and its pictures go.",
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything and print predictions; load no weights, measure nothing",
    )
    _add_json(parser)
    parser.add_class_arguments(StepConfig, "step")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def _add_json(parser: Parser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables; sizes in bytes"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-gains``.

    Exit codes: 0 finished; 1 a training run of ``--step`` could not go on; 2 wrong flags or too
    little memory; 130 interrupted.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["oprd-gains", *given])
    if any(word == "--step" or word.startswith("--step.") for word in given):
        _measure_steps([word for word in given if word != "--step"], command)
        return
    parser = make_parser()
    parsed = parser.parse_args(given)
    if parsed.step:
        parser.error("step is not an option of a file: give --step on the command line")
    made = parser.instantiate(parsed)
    cfg = GainsConfig(**{f.name: made[f.name] for f in fields(GainsConfig)})
    quiet_libraries()
    run_command("oprd-gains", lambda: run(cfg, command, parsed.dry_run, parsed.json))


def _measure_steps(given: list[str], command: str) -> None:
    demo = demo_values()
    demo = demo | {"opd": demo["opd"] | {"k": DEMO_K}}
    parser, parsed = make_step_parser(), parse_run(make_step_parser, given, demo)
    quiet_libraries()
    made = parser.instantiate(parsed)
    cfg = TrainConfig(**{k: v for k, v in vars(made).items() if k not in CONTROLS})
    dry_run, as_json = parsed.dry_run, parsed.json
    run_command("oprd-gains", lambda: _steps(cfg, made.step, command, dry_run, as_json))


def _steps(cfg: TrainConfig, step: StepConfig, command: str, dry_run: bool, as_json: bool) -> None:
    from oprd.benchmark.step import run_step
    from oprd.benchmark.step_report import write_report
    from oprd.benchmark.step_tables import tables
    from oprd.report.step_pictures import write_pictures
    from oprd.training.trainer import TrainingStopped

    try:
        report = run_step(cfg, step, command, dry_run, as_json)
    except TrainingStopped as error:
        sys.stderr.write(f"oprd-gains: stopped: {error}\n")
        sys.exit(1)
    if report is not None and cfg.output_dir is not None:
        directory = Path(cfg.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        pictures = write_pictures(report, directory)
        write_report(report, tables(report), pictures, directory)
        if not as_json:
            print(f"report: {directory}/step.md, step.json and {len(pictures)} pictures")


if __name__ == "__main__":
    main()

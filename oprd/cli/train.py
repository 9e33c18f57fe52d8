"""``oprd-train``: train with a configuration from defaults, YAML and the command line.

oprd-train                                    # the demo: minutes on a CPU
oprd-train --config recipes/x.yaml --dry_run  # check a recipe without loading weights
oprd-train --print_config                     # print all options; --help explains them
torchrun --nproc-per-node 2 -m oprd.cli.train # several ranks
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from oprd.cli.environment import print_conclusion, quiet_libraries
from oprd.cli.parser import Parser, parse_run, run_command
from oprd.config import TrainConfig
from oprd.config.demo import demo_values
from oprd.distributed import run_main, world_size
from oprd.errors import ConfigError
from oprd.memory_plan.config import PlanConfig

if TYPE_CHECKING:
    from oprd.observability.summary import Summary

CONTROLS = ("config", "dry_run", "stages", "plan")
"""Options that are not part of `TrainConfig`."""


def make_parser() -> Parser:
    """Return the parser of ``oprd-train``."""
    parser = Parser(
        prog="oprd-train",
        description="On-policy representation distillation. Without models of your own, run the "
        "demo, whose options are those of `--config demo`.",
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check configuration, prompts and models' configurations; load no weights, write "
        "nothing",
    )
    parser.add_argument(
        "--stages",
        type=dict[str, dict[str, Any]],
        default={},
        help="runs that follow one another, by name, with the options that each changes; each run "
        "trains the student that the previous one saved",
    )
    parser.add_class_arguments(PlanConfig, "plan")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def to_config(parsed: Namespace) -> TrainConfig:
    """Return the run's configuration from parsed and instantiated options."""
    return TrainConfig(**{k: v for k, v in vars(parsed).items() if k not in CONTROLS})


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-train``.

    Exit codes: 0 finished; 1 stopped by an error, or the planned run does not fit; 2 wrong
    configuration; 124 a rank hung (`oprd.observability.hang_watchdog`); 130 ended by Ctrl-C and 143
    by SIGTERM, with a checkpoint from which ``--resume auto`` continues. torchrun exits with 1 in
    all cases but 0.
    """
    parser, parsed = make_parser(), parse_run(make_parser, argv, demo_values())
    quiet_libraries()
    run_command("oprd-train", lambda: _run(parser, parsed))


def _run(parser: Parser, parsed: Namespace) -> None:
    plans = parsed.plan.gpus is not None
    if plans and not parsed.dry_run:
        raise ConfigError("plan.gpus only plans a run: add --dry_run")
    if plans and parsed.stages:
        raise ConfigError(
            "plan.gpus plans a single run, but there are stages: plan each stage alone, with "
            "--stages '{}' and its options"
        )
    if parsed.stages:
        _run_stages(parsed)
        return
    made = parser.instantiate(parsed)
    if not parsed.dry_run:
        from oprd.training.trainer import train

        _finish(lambda: train(to_config(made)))
        return
    made.plan.check()
    if not dry_run(to_config(made), made.plan):
        sys.exit(1)


def _run_stages(parsed: Namespace) -> None:
    from oprd.training import stages

    plain = {k: v for k, v in parsed.as_dict().items() if k not in CONTROLS}
    if not parsed.dry_run:
        _finish(lambda: stages.run_stages(plain, parsed.stages))
        return
    unchecked = stages.check(stages.stage_values(plain, parsed.stages), dry_run=True)
    print_conclusion(
        f"the stages {', '.join(parsed.stages)}",
        notes=(),
        unchecked=[f"{name}: {item}" for name, items in unchecked.items() for item in items],
    )


def _finish(run: Callable[[], Summary | None]) -> None:
    """Call ``run``; exit with the code of what ended it, unless it finished."""
    from oprd.training.trainer import TrainingStopped

    try:
        summary = run()
    except TrainingStopped as error:
        sys.stderr.write(f"oprd-train: stopped: {error}\n")
        sys.exit(1)
    if summary is not None and summary.stopped_by is not None:
        sys.exit(128 + summary.stopped_by)


def dry_run(cfg: TrainConfig, plan: PlanConfig) -> bool:
    """Check a run, and print its inputs and the memory plan that ``plan`` asks for.

    Returns:
        False if the planned run does not fit, True otherwise.
    """
    from oprd.distributed.device import check_device
    from oprd.memory_plan.report import show_training_plan
    from oprd.training.overview import overview
    from oprd.training.preflight import output_dir, preflight

    inputs = preflight(cfg, dry_run=True, ranks=plan.gpus)
    device, ranks = check_device(cfg.device), plan.gpus or world_size()
    for line in overview(cfg, inputs, device, ranks, output_dir(cfg)):
        print(line)
    if inputs.resume.checkpoints:
        print(f"resume: from {inputs.resume.checkpoints[0].path}")
    print_conclusion("the run", inputs.notes, inputs.unchecked)
    return plan.gpus is None or show_training_plan(cfg, plan, inputs.bridge_ranks)


if __name__ == "__main__":  # for torchrun
    run_main(main)

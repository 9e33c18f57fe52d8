"""``oprd-train``: configuration from defaults, YAML and the command line.

oprd-train                                    # the demo: minutes on a CPU
oprd-train --config recipes/x.yaml --dry_run  # check a recipe without loading weights
oprd-train --print_config                     # every option, with what it means: --help
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
from jsonargparse import ArgumentParser, Namespace

from oprd.config import EvalConfig, TrainConfig
from oprd.errors import ConfigError
from oprd.memory_plan.config import PlanConfig, check_plan

if TYPE_CHECKING:
    from oprd.train import Summary

UNKNOWN = (
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"Key '(?P<key>[\w.]+)' is not expected"),
)


CONTROLS = ("config", "dry_run", "stages", "plan")
"""Options that are not part of a run's configuration."""


class Parser(ArgumentParser):
    """Names the nearest option where an unknown one is given."""

    def error(self, message: str, ex: Exception | None = None):
        """Ends the program (exit code 2) with the message, on one line where it can be."""
        for pattern in UNKNOWN:
            if match := pattern.search(message):
                parts = match.groupdict()
                key = ".".join(p for p in (parts.get("group"), parts["key"]) if p)
                message = f"unknown option {key!r}"
                if near := nearest(key, self.option_names()):
                    message += f"; did you mean {near!r}?"
                message += " (--print_config lists them all)"
                break
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)

    def option_names(self) -> list[str]:
        """Every option, dotted."""
        return [action.dest for action in self._actions if action.dest != "help"]


def nearest(key: str, names: Sequence[str]) -> str | None:
    """The name that a mistyped key most likely stands for."""
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in names}
    for candidates in (names, list(by_last_part)):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.6):
            return close[0] if close[0] in names else by_last_part[close[0]]
    return None


def make_parser() -> Parser:
    """The parser of ``oprd-train``."""
    parser = Parser(
        prog="oprd-train",
        description="On-policy representation distillation. Without options: the demo.",
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
        help="several runs in order, by name, each from the student that the last one left, and "
        "what each changes of the other options",
    )
    parser.add_class_arguments(PlanConfig, "plan")
    parser.add_class_arguments(TrainConfig, None)
    # As plain values: jsonargparse prints those, but not dataclass instances inside a dict.
    parser.set_defaults({"eval.sets": {k: asdict(v) for k, v in EvalConfig().sets.items()}})
    return parser


def to_config(parsed: Namespace) -> TrainConfig:
    """The dataclass of what was parsed."""
    return TrainConfig(**{k: v for k, v in vars(parsed).items() if k not in CONTROLS})


def run_stages(parser: Parser, parsed: Namespace) -> Summary | None:
    """The runs of ``stages``; with ``dry_run`` only their checks."""
    from oprd import stages

    plain = {k: v for k, v in parsed.as_dict().items() if k not in CONTROLS}

    def build(values: dict[str, Any]) -> TrainConfig:
        return to_config(parser.instantiate(parser.parse_object(values)))

    def write_config(values: dict[str, Any], directory: Path) -> None:
        parser.save(parser.parse_object(values), directory / "config.yaml", overwrite=True,
                    skip_unset=False)  # fmt: skip

    if parsed.dry_run:
        values = stages.stage_values(plain, parsed.stages)
        unchecked = stages.check(values, build, dry_run=True)
        for name, items in unchecked.items():
            for item in items:
                print(f"not checked: {name}: {item}")
        print(conclusion(any(unchecked.values()), f"the stages {', '.join(parsed.stages)}"))
        return None
    return stages.run_stages(plain, parsed.stages, build, write_config)


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub's address answers; behind a proxy this can't be told and is assumed."""
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = endpoint.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=timeout).close()
    except OSError:
        return False
    return True


def leave_out_an_unreachable_hub() -> None:
    """The libraries would ask it again for minutes."""
    if not hub_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # some have read the variable already


def quiet_libraries() -> None:
    """Progress bars and notices of the libraries beneath, which would tear up our own lines."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def dry_run(cfg: TrainConfig, plan: PlanConfig) -> bool:
    """Print what `oprd.preflight.preflight` finds, and what ``plan`` asks for; returns whether
    nothing speaks against the run."""
    from oprd.memory_plan.report import show_training_plan
    from oprd.preflight import preflight

    found = preflight(cfg, dry_run=True, ranks=plan.gpus)
    r = cfg.rollout
    print(
        f"run {cfg.name!r}: {cfg.steps} steps of {r.prompts_per_step} prompts x "
        f"{r.responses_per_prompt} responses, at most {r.max_new_tokens} new tokens"
    )
    for name, teacher in cfg.all_teachers.items():
        where = f" for the prompts of {name}" if name else ""
        print(f"student {cfg.student.path} <- teacher {teacher.path}{where}")
        if name in found.layer_pairs:
            pairs = ", ".join(f"{s}<-{t}" for s, t in found.layer_pairs[name])
            print(f"layers (student<-teacher): {pairs}")
    for name, prompts in {"train": found.train, **found.eval_sets}.items():
        if prompts:
            longest = max(len(p.token_ids) for p in prompts.prompts)
            print(f"prompts {name}: {len(prompts)}, the longest {longest} tokens")
    if found.resume.checkpoints:
        print(f"resume: from {found.resume.checkpoints[0].path}")
    for note in found.notes:
        print(f"note: {note}")
    for item in found.unchecked:
        print(f"not checked: {item}")
    print(conclusion(bool(found.unchecked), "the run"))
    return plan.gpus is None or show_training_plan(cfg, plan, found.bridge_ranks)


def conclusion(unchecked: bool, what: str) -> str:
    """Of a dry run that found nothing wrong."""
    if unchecked:
        return "the configuration is consistent as far as it could be checked from here"
    return f"everything checked: {what} can start"


def train(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``oprd-train``.

    Exit codes: 0 finished, 1 stopped by an error or planned not to fit, 2 wrong configuration, 124
    a rank hung (`oprd.observability.hang_watchdog`); 130 ended by Ctrl-C and 143 by SIGTERM, with a
    checkpoint that ``--resume auto`` goes on from. (torchrun's own code is 1 for all of them but
    0.)
    """
    parser = make_parser()
    parsed = parser.parse_args(argv)
    if parsed.dry_run:
        leave_out_an_unreachable_hub()
    quiet_libraries()

    from oprd.train import TrainingStopped
    from oprd.train import train as run

    def write_config(directory: Path) -> None:
        parser.save(parsed, directory / "config.yaml", overwrite=True, skip_unset=False)

    try:
        if parsed.plan.gpus is not None and not parsed.dry_run:
            raise ConfigError("plan.gpus plans a run, and runs nothing: add --dry_run")
        if parsed.plan.gpus is not None and parsed.stages:
            raise ConfigError(
                "plan.gpus plans one run, and there are stages: plan each without the others, with "
                "--stages '{}' and its options"
            )
        if parsed.stages:
            summary = run_stages(parser, parsed)
            if summary is None:
                return
        else:
            made = parser.instantiate(parsed)
            cfg = to_config(made)
            if parsed.dry_run:
                check_plan(made.plan)
                if not dry_run(cfg, made.plan):
                    sys.exit(1)
                return
            summary = run(cfg, write_config)
    except ConfigError as error:
        sys.stderr.write(f"oprd-train: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:  # outside the training loop, which handles it itself
        sys.stderr.write("oprd-train: interrupted\n")
        sys.exit(130)
    except TrainingStopped as error:
        sys.stderr.write(f"oprd-train: stopped: {error}\n")
        sys.exit(1)
    if summary.stopped_by is not None:
        sys.exit(128 + summary.stopped_by)

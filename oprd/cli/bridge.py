"""``oprd-bridge``: fit, sweep, import and show bridges.

oprd-bridge fit --student.path ./student --teacher.path ./teacher --output bridge.safetensors
oprd-bridge sweep bridge.safetensors --output_dir sweep
oprd-bridge import ps_bank.pt --output bridge.safetensors
oprd-bridge show bridge.safetensors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from oprd.bridge.bank import BridgeInfo, check_new_file, read_info, save_bridge
from oprd.bridge.config import FitConfig
from oprd.bridge.import_public import read_ps_bank
from oprd.bridge.preflight import check_fit
from oprd.bridge.show import tables
from oprd.bridge.sweep import sweep
from oprd.cli.environment import print_conclusion, quiet_libraries
from oprd.cli.parser import Parser, parse_run, run_command
from oprd.config.demo import demo_values
from oprd.distributed import run_main
from oprd.errors import ConfigError
from oprd.observability.tables import show


def make_parser() -> Parser:
    """Return the parser of ``oprd-bridge``."""
    parser = Parser(
        prog="oprd-bridge",
        description="Projectors that let a student learn from a teacher of any width and depth.",
    )
    commands = parser.add_subcommands(required=True, dest="command")

    commands.add_subcommand("fit", make_fit_parser(), help="fit a bridge to student rollouts")

    sweep = Parser(description="Cosine by rank, before and after fitting (the paper's Figure 12).")
    sweep.add_argument("bridge", help="a file that fit wrote")
    sweep.add_argument(
        "--output_dir", default="sweep", help="directory for sweep.csv, sweep.json and sweep.png"
    )
    commands.add_subcommand(
        "sweep", sweep, help="compute the cosine by rank as a table and a figure"
    )

    imported = Parser(
        description="Convert a ps_bank.pt of the public OPRD code "
        "(github.com/ShenzhiYang2000/OPRD) into a bridge."
    )
    imported.add_argument(
        "bank", help="a ps_bank.pt file with linear projectors; no code in it is run"
    )
    imported.add_argument("--output", required=True, help="the file to write")
    imported.add_argument(
        "--student",
        type=str | None,
        default=None,
        help="the student that it was fitted for, to check and record its shape",
    )
    imported.add_argument(
        "--teacher",
        type=str | None,
        default=None,
        help="the teacher that it was fitted for, to check and record its shape",
    )
    commands.add_subcommand("import", imported, help="convert a ps_bank.pt of the public OPRD code")

    describe = Parser(description="Describe a bridge and the quality of its layers.")
    describe.add_argument("bridge", help="a file that fit or import wrote")
    describe.add_argument("--rank", type=int | None, default=None, help="describe it at this rank")
    describe.add_argument("--json", action="store_true", help="print JSON instead of tables")
    commands.add_subcommand("show", describe, help="describe a bridge")
    return parser


def make_fit_parser() -> Parser:
    """Return the parser of ``oprd-bridge fit``."""
    fit = Parser(
        prog="oprd-bridge fit",
        description="Fit a bridge to student rollouts. Without a student of your own, use the "
        "demo's, and the options of the demo.",
    )
    fit.add_argument("--config", action="config", help="a YAML file with any of the options")
    fit.add_argument(
        "--dry_run",
        action="store_true",
        help="check configuration, prompts and models' configurations; load no weights, write "
        "nothing",
    )
    fit.add_class_arguments(FitConfig, None)
    return fit


def demo_fit_values() -> dict[str, Any]:
    """Return the demo's options of a fit."""
    demo = demo_values()
    return demo | {name: demo["distill"][name] for name in ("positions", "k", "shift")}


def run_fit(options: Namespace) -> None:
    """Run ``oprd-bridge fit``."""
    values = {k: v for k, v in vars(options).items() if k not in ("config", "dry_run")}
    cfg = FitConfig(**values)
    if not options.dry_run:
        from oprd.bridge.fit import fit

        fit(cfg)
        return
    checked = check_fit(cfg, dry_run=True)
    if checked.pairs:
        print("layers (student<-teacher): " + ", ".join(f"{s}<-{t}" for s, t in checked.pairs))
    if checked.prompts:
        print(f"prompts: {len(checked.prompts)}, {checked.held_out_prompts} of them held out")
    print_conclusion("the fit", checked.notes, checked.unchecked)


def run_sweep(options: Namespace) -> None:
    """Run ``oprd-bridge sweep``."""
    show(Console(highlight=False), [sweep(options.bridge, options.output_dir)])


def run_import(options: Namespace) -> None:
    """Run ``oprd-bridge import``."""
    check_new_file(options.output)
    bridge = read_ps_bank(options.bank)
    save_bridge(replace(bridge, info=_with_models(bridge.info, options)), options.output)
    print(f"bridge: {options.output}")


def _with_models(info: BridgeInfo, options: Namespace) -> BridgeInfo:
    """Return ``info`` with the shapes of the models that ``--student`` and ``--teacher`` name.

    Raises:
        ConfigError: if the bridge does not fit these models.
    """
    from oprd.models.info import model_info
    from oprd.models.loading import load_config

    models = {
        who: model_info(load_config(path), path)
        for who in ("student", "teacher")
        if (path := getattr(options, who)) is not None
    }
    info.check(models.get("student", info.student), models.get("teacher", info.teacher), info.pairs)
    for who, blocks in zip(("student", "teacher"), zip(*info.pairs, strict=True), strict=True):
        if who in models and max(blocks) >= (models[who].layers or 0):
            raise ConfigError(
                f"the bridge has {who} block {max(blocks)}, but {models[who].path} has "
                f"{models[who].layers} layers"
            )
    return replace(
        info,
        student=models.get("student", info.student),
        teacher=models.get("teacher", info.teacher),
    )


def run_show(options: Namespace) -> None:
    """Run ``oprd-bridge show``."""
    info = read_info(options.bridge).at_rank(options.rank)
    if options.json:
        print(json.dumps(asdict(info), indent=1))
        return
    show(Console(highlight=False), tables(info))


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-bridge``.

    Exit codes: 0, 2 wrong configuration or file, 130 interrupted.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["fit"]:
        parsed = parse_run(make_fit_parser, arguments[1:], demo_fit_values())
        fit = make_fit_parser().instantiate(parsed)
        quiet_libraries()
        run_command("oprd-bridge", lambda: run_fit(fit))
        return
    parser = make_parser()
    parsed = parser.instantiate(parser.parse_args(arguments))
    options = parsed[parsed.command]
    quiet_libraries()
    command = {"sweep": run_sweep, "import": run_import, "show": run_show}
    run_command("oprd-bridge", lambda: command[parsed.command](options))


if __name__ == "__main__":  # for torchrun
    run_main(main)

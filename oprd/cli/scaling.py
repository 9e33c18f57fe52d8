"""``oprd-scaling``: predict a training step on other numbers of GPUs, from what was measured.

oprd-scaling --measured runs/r1                          # a run of oprd-train
oprd-scaling --measured gains/gains.json                 # one GPU's update, by oprd-gains
oprd-scaling --measured runs/r1 --gpus '[8,64]' --links.network_gbs 25 --output_dir scaling
oprd-scaling --measured runs/r1 --rollout_tokens_per_second 20000   # what your engine samples
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields

from oprd.benchmark.scaling_config import ScalingConfig
from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import Parser, run_command


def make_parser() -> Parser:
    """Return the parser of ``oprd-scaling``."""
    parser = Parser(prog="oprd-scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables; seconds and bytes"
    )
    parser.add_class_arguments(ScalingConfig, None)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-scaling``. Exit codes: 0, 2 wrong options or files, 130 interrupted."""
    parser = make_parser()
    given = sys.argv[1:] if argv is None else list(argv)
    parsed = parser.parse_args(given)
    made = parser.instantiate(parsed)
    cfg = ScalingConfig(**{f.name: made[f.name] for f in fields(ScalingConfig)})
    quiet_libraries()
    command = shlex.join(["oprd-scaling", *given])
    run_command("oprd-scaling", lambda: run(cfg, command, parsed.json))


def run(cfg: ScalingConfig, command: str, as_json: bool) -> None:
    """Predict, print and write.

    Raises:
        ConfigError: as `oprd.report.scaling.make_prediction`.
    """
    from rich.console import Console

    from oprd.observability.tables import show
    from oprd.report import scaling

    made = scaling.make_prediction(cfg)
    if as_json:
        print(json.dumps(scaling.as_json(made, command), indent=1))
    else:
        show(Console(highlight=False), scaling.tables(made))
    scaling.write(made, command)


if __name__ == "__main__":
    main()

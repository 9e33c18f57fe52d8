"""``oprd-gains``: measure and predict what OPRD saves in the actor update.

oprd-gains                                          # Qwen2.5-0.5B's shape, 384 tokens
oprd-gains --dry_run                                # only the prediction from shapes
oprd-gains --d 1536 --layers 28                     # heads and MLP follow from d
oprd-gains --dry_run --json | jq .modes             # for machines
oprd-gains --student.path ./student --objectives '[backbone,oprd,opd_topk]'
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields

from oprd.benchmark.config import GainsConfig
from oprd.benchmark.gains import run
from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import Parser, run_command


def make_parser() -> Parser:
    """Return the parser of ``oprd-gains``."""
    parser = Parser(prog="oprd-gains", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only print the predictions, also for the paper's run; measure nothing",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of tables; sizes in bytes"
    )
    parser.add_class_arguments(GainsConfig, None)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-gains``.

    Exit codes: 0 finished, 2 wrong flags or too little memory, 130 interrupted.
    """
    parser = make_parser()
    given = sys.argv[1:] if argv is None else list(argv)
    parsed = parser.parse_args(given)
    made = parser.instantiate(parsed)
    cfg = GainsConfig(**{f.name: made[f.name] for f in fields(GainsConfig)})
    quiet_libraries()
    command = shlex.join(["oprd-gains", *given])
    run_command("oprd-gains", lambda: run(cfg, command, parsed.dry_run, parsed.json))


if __name__ == "__main__":
    main()

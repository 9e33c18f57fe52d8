"""``oprd-paper``: ask the paper's questions on a small task, and report the answers beside its own.

oprd-paper --output_dir out                     # all questions; about an hour on two cores
oprd-paper --output_dir out --quick true        # the main ones, with one seed
oprd-paper --output_dir out --rows '[oprd, opd_top1]' --seeds '[0, 1, 2, 3, 4]'
oprd-paper --output_dir out --tune true         # choose the recipe's learning rates anew
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields

from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import Parser, run_command
from oprd.paper.command import PaperConfig, run_paper
from oprd.paper.jobs import JobsFailed


def make_parser() -> Parser:
    """Return the parser of ``oprd-paper``."""
    parser = Parser(prog="oprd-paper", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_class_arguments(PaperConfig, None)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-paper``.

    Exit codes: 0; 1 runs failed, and the report is of the others; 2 wrong options; 130 ended by
    Ctrl-C and 143 by SIGTERM: the same command goes on.
    """
    parser = make_parser()
    made = parser.instantiate(parser.parse_args(argv))
    cfg = PaperConfig(**{f.name: made[f.name] for f in fields(PaperConfig)})
    quiet_libraries()
    try:
        run_command(
            "oprd-paper",
            lambda: run_paper(cfg),
            interrupted="interrupted; run the same command again to continue",
        )
    except JobsFailed as error:
        sys.stderr.write(f"oprd-paper: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""``oprd-compare``: compare objectives on the same models and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from oprd.benchmark.compare import CompareConfig, Comparison, demo_variants
from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import Parser, run_command
from oprd.config.demo import demo_config


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-compare``.

    Exit codes: 0; 2 wrong configuration; 130 ended by Ctrl-C and 143 by SIGTERM: the same command
    goes on.
    """
    parser = Parser(
        prog="oprd-compare", description="Compare objectives on the same models and prompts."
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_class_arguments(CompareConfig, None)
    sets = demo_config().eval.sets
    parser.set_defaults({"run.eval.sets": {k: asdict(v) for k, v in sets.items()}})
    parser.set_defaults({"variants": {k: asdict(v) for k, v in demo_variants().items()}})
    parsed = parser.instantiate(parser.parse_args(argv))
    quiet_libraries()
    values = {k: v for k, v in vars(parsed).items() if k != "config"}
    run_command(
        "oprd-compare",
        lambda: Comparison(CompareConfig(**values)).run(),
        interrupted="interrupted; run the same command again to continue",
    )


if __name__ == "__main__":
    main()

"""``oprd-eval``: how good models are, and which is better.

oprd-eval runs/demo demo:teacher --sets demo      # a run's student and its teacher
oprd-eval before=./base after=runs/x --sets aime24 math500 --engine vllm
oprd-eval runs/x --sets problems.jsonl --teacher ./teacher   # needs no answers
oprd-eval --regrade --output_dir runs/eval-x      # grade the kept samples again
torchrun --nproc-per-node 2 -m oprd.cli.eval runs/x --sets gsm8k
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import Namespace

from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import Parser, run_command
from oprd.distributed import run_main
from oprd.evaluation.config import EvalRunConfig


def make_parser() -> Parser:
    """Return the parser of ``oprd-eval``."""
    parser = Parser(
        prog="oprd-eval",
        description="Sample, grade and compare models. An interrupted evaluation goes on in its "
        "output_dir.",
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options")
    parser.add_argument(
        "models",
        nargs="*",
        type=str,
        help="PATH or NAME=PATH of a run, a checkpoint, an exported student, another local model, "
        "or a hub name; the first is what the others are compared with",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        type=str,
        default=[],
        help="aime24, aime25, aimo, math500, gsm8k, demo, a file, a hub data set, "
        "reasoning_gym:TASK, or the name of one in eval.sets of a run among the models",
    )
    parser.add_class_arguments(EvalRunConfig, None, skip={"models", "sets"})
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-eval``.

    Exit codes: 0 finished; 1 an engine failed; 2 wrong options, models or sets; 130 interrupted:
    the same command with the same ``--output_dir`` goes on.
    """
    parser = make_parser()
    parsed = parser.parse_args(argv)
    quiet_libraries()
    run_command(
        "oprd-eval",
        lambda: _run(parser.instantiate(parsed)),
        interrupted="interrupted; the samples are kept: give the same --output_dir to go on",
    )


def _run(options: Namespace) -> None:
    from oprd.engines.base import EngineFailure
    from oprd.evaluation.run import evaluate_models

    values = {k: v for k, v in vars(options).items() if k != "config"}
    values["models"], values["sets"] = list(values["models"] or []), list(values["sets"] or [])
    try:
        evaluate_models(EvalRunConfig(**values))
    except EngineFailure as error:
        sys.stderr.write(f"oprd-eval: stopped: {error}\n")
        sys.exit(1)


if __name__ == "__main__":  # for torchrun
    run_main(main)

"""``oprd-export``: write a checkpoint's student in a format that `from_pretrained` loads.

oprd-export runs/demo OUTPUT                    # the newest checkpoint of a run
oprd-export runs/demo OUTPUT --best             # the one that checkpoint.keep_best keeps
oprd-export runs/demo/checkpoints/step_00000040 OUTPUT --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oprd.checkpoint.export import DTYPES, choose, export
from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-export``.

    Exit codes: 0, 1 output could not be written, 2 wrong arguments or checkpoint, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="oprd-export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the directory of a run")
    parser.add_argument("output", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--best", action="store_true", help="export the best checkpoint of a run")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: as trained")
    options = parser.parse_args(argv)
    quiet_libraries()
    run_command("oprd-export", lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    try:
        checkpoint = choose(options.checkpoint, options.best)
        export(checkpoint, options.output, options.dtype)
    except OSError as error:
        sys.stderr.write(f"oprd-export: {options.output} could not be written: {error}\n")
        sys.exit(1)
    print(f"step {checkpoint.step}: {options.output}")


if __name__ == "__main__":
    main()

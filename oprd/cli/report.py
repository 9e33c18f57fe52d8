"""``oprd-report``: show runs and evaluations as one HTML page and as PNGs.

oprd-report runs/demo                           # report/index.html and report/*.png
oprd-report runs/compare --output_dir out       # all runs of a comparison, seeds joined
oprd-report runs/a runs/b sweep                 # several; sweep is of oprd-bridge sweep
oprd-report runs/demo runs/eval                 # with what oprd-eval wrote, problem by problem
oprd-report runs/demo --watch                   # follows a run that is going on
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from oprd.cli.environment import quiet_libraries
from oprd.cli.parser import run_command
from oprd.report.build import ReportConfig, report


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``oprd-report``. Exit codes: 0, 2 wrong arguments or no run, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="oprd-report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="a run, a directory of oprd-eval, oprd-compare or oprd-bridge sweep, or a directory\n"
        "of such",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, default=Path("report"), help="default: %(default)s"
    )
    parser.add_argument(
        "--set", dest="set_name", metavar="NAME", help="evaluation set that results are compared on"
    )
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS",
        help="write the page again every SECONDS (default: 10) until all runs have ended",
    )  # fmt: skip
    options = parser.parse_args(argv)
    quiet_libraries()
    cfg = ReportConfig(options.runs, options.output_dir, options.set_name, options.watch)
    run_command("oprd-report", lambda: report(cfg), interrupted="stopped")


if __name__ == "__main__":
    main()

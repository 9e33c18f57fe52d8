import json

import pytest

from benchmarks.machine import describe
from benchmarks.report import markdown, points_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="every row count, width, dtype, rank and thread count instead of a few minutes' worth",
    )


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["oprd"] = describe()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config) -> None:
    """The table that pytest-benchmark's columns have no room for."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    entries = [json.loads(json.dumps(b.as_dict(include_data=False))) for b in session.benchmarks]
    points = points_of(entries)
    if points:
        terminalreporter.write_line("")
        terminalreporter.write_line(markdown(points, describe()))

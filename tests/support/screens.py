"""What a command shows on a terminal, and in a pipe."""

import io

from rich.console import Console

from oprd.observability.tables import show

WIDTH = 80


def rendered(tables, terminal=False, width=WIDTH) -> list[str]:
    """The lines that tables give on a terminal, without its colours, or in a pipe."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        no_color=True,
        highlight=False,
    )
    with console.capture() as captured:
        show(console, tables)
    return captured.get().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()


def check_fits(tables, width=WIDTH) -> list[str]:
    """Assert that no line is too long and that each cell is in one piece; return a pipe's lines."""
    plain = rendered(tables, width=width)
    for lines in (plain, rendered(tables, terminal=True, width=width)):
        assert max(map(len, lines)) <= width, max(lines, key=len)
        for table in tables:
            for row in table.rows:
                words = " ".join(row).split()
                assert any(line.split() == words for line in lines), row
    assert all(line.isprintable() and line == line.rstrip() for line in plain)
    assert not any("\u2500" <= c <= "\u257f" for line in plain for c in line)  # no box drawing
    return plain

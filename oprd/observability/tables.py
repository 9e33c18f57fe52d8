"""Tables for a terminal of 80 columns, and as plain lines for a pipe or a log."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

NAME_WIDTH = 24
"""Columns that a column of words keeps when there is no room for its longest."""
GAP = 2
"""Spaces between columns."""
_LINE = "    \n    \n {0}{0} \n    \n    \n    \n    \n    \n"
"""A box that has nothing but a line below the heads."""


@dataclass(frozen=True)
class TextTable:
    """A table of short cells, numbers on the right.

    Rich prints it: at a terminal with bold heads, in a pipe as plain ASCII lines without escape
    codes. Numbers keep their full width. Only words are folded, and only where the terminal has no
    room for them.

    Attributes:
        title: a line above the table; empty: there is none.
        heads: the columns' heads, with units; ``\\n`` starts another line of a head. All empty:
            there is no line of heads.
        rows: the cells, one sequence a row; an empty sequence is a blank line.
        notes: paragraphs below the table.
        left: columns of words, aligned on the left.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: Sequence[int] = (0,)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType | Segment]:
        plain = not console.is_terminal
        table = self._table("-" if plain else "\u2500")
        width = max(options.max_width, self._least_width())
        if self.title:
            yield Text(self.title, style="bold", no_wrap=False, overflow="fold")
        for line in console.render_lines(table, options.update(width=width), pad=False):
            if plain:
                yield Text("".join(segment.text for segment in line).rstrip())
            else:
                yield from line
                yield Segment.line()
        if self.notes:
            yield Text()
        for note in self.notes:
            yield Text("\n".join(wrapped(note, min(options.max_width, 100))))

    def parts(self, width: int) -> list[TextTable]:
        """Return the table, or if ``width`` columns do not hold it, several with fewer numbers.

        Each has the columns of words, and as many of the others as fit.
        """
        if self._least_width() <= width:
            return [self]
        numbers = [i for i in range(len(self.heads)) if i not in self.left]
        made: list[TextTable] = []
        while numbers:
            count = len(numbers)
            while count > 1 and self._only(numbers[:count])._least_width() > width:
                count -= 1
            title = f"{self.title} (continued)" if made and self.title else self.title
            made.append(replace(self._only(numbers[:count]), title=title, notes=()))
            numbers = numbers[count:]
        return [*made[:-1], replace(made[-1], notes=self.notes)] if made else [self]

    def _only(self, numbers: Sequence[int]) -> TextTable:
        """Return the table with its columns of words and these others."""
        kept = sorted([*self.left, *numbers])
        rows = [[row[i] for i in kept] if row else row for row in self.rows]
        left = [kept.index(i) for i in self.left]
        return replace(self, heads=[self.heads[i] for i in kept], rows=rows, left=left)

    def _least_width(self) -> int:
        """Return the width below which more than names would have to be folded."""
        widths = [
            max(cell_len(line) for cell in column for line in cell.split("\n"))
            for column in self._columns()
        ]
        kept = (min(w, NAME_WIDTH) if i in self.left else w for i, w in enumerate(widths))
        return sum(kept) + GAP * (len(widths) - 1)

    def _columns(self) -> Iterator[list[str]]:
        for i, head in enumerate(self.heads):
            yield [head, *(row[i] for row in self.rows if row)]

    def _table(self, rule: str) -> Table:
        table = Table(
            box=Box(_LINE.format(rule)),
            show_header=any(self.heads),
            show_edge=False,
            pad_edge=False,
            padding=(0, 0, 0, GAP - 1),
        )
        for i, head in enumerate(self.heads):
            justify: JustifyMethod = "left" if i in self.left else "right"
            table.add_column(
                Text(head, justify=justify),
                justify=justify,
                no_wrap=i not in self.left,
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def wrapped(note: str, width: int) -> list[str]:
    """Return a paragraph as lines of at most ``width`` characters, indented below its first."""
    return textwrap.wrap(
        note, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def show(console: Console, tables: Sequence[TextTable]) -> None:
    """Print tables with a blank line after each. Lines too long for the screen are not cut."""
    for table in tables:
        console.print(table, soft_wrap=True)
        console.print()

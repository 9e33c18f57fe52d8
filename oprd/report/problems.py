"""Problem by problem: which of them models solve, and the samples' texts that a page holds.

Of every problem there is a line. A page that opens in seconds can't hold the text of 100,000
samples: it holds one sample of each model of the problems on which models differ most, then
another with the other verdict, then more, until there are `BUDGET` characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from oprd.report.boards import Board
from oprd.report.evals import RIGHT, Tally
from oprd.report.read import number
from oprd.report.samples import as_text, shortened

BUDGET = 12_000_000
"""Characters of prompts and responses on a page."""
CHUNK = 100
"""Problems whose texts are read at once by the page."""
PREVIEW = 110
"""Characters of a prompt in the list of problems."""

_TAG = re.compile(
    r"<\|im_start\|>\w*|<\|start_header_id\|>\w*<\|end_header_id\|>|<\|[^|<>]*\|>|</?s>"
)
"""What chat templates write around messages."""


@dataclass
class Texts:
    """The texts of a problem.

    Attributes:
        prompt: as the baseline reads it.
        samples: by the model's place, then by the sample's: (response, tokens, whether it was cut).
    """

    prompt: str = ""
    samples: dict[int, dict[int, tuple[str, int | None, bool]]] = field(default_factory=dict)


@dataclass
class View:
    """What the page's script shows of a board.

    Attributes:
        rows: (problem, answer, beginning of the prompt, verdicts of each model), by problem.
        texts: by place in ``rows``.
    """

    board: Board
    rows: list[tuple[int, str, str, list[str]]]
    texts: dict[int, Texts] = field(default_factory=dict)

    def gap(self, row: int) -> float:
        """Return how much the models differ on a problem."""
        shares = [v.count(RIGHT) / len(v) for v in self.rows[row][3] if v]
        return max(shares) - min(shares) if shares else 0.0

    def lines(self) -> Markup:
        """Return models and rows as JSON for the page."""
        values = {
            "models": [m.label for m in self.board.models], "graded": self.board.graded,
            "chunk": CHUNK, "rows": self.rows,
        }  # fmt: skip
        return as_json(values)

    def chunks(self) -> list[tuple[int, Markup]]:
        """Return the texts as JSON: (number of the chunk, those of as many problems)."""
        found: dict[int, dict[int, Any]] = {}
        for row, texts in sorted(self.texts.items()):
            found.setdefault(row // CHUNK, {})[row] = [texts.prompt, texts.samples]
        return [(chunk, as_json(values)) for chunk, values in found.items()]

    def counts(self) -> list[tuple[str, str, list[int]]]:
        """Return, for the baseline and each other model, problems with a right sample of both, of
        only the first, of only the second, and of neither."""
        labels = [m.label for m in self.board.models]
        found = []
        for other in range(1, len(labels)):
            cells = [0, 0, 0, 0]
            for *_, verdicts in self.rows:
                first, second = RIGHT in verdicts[0], RIGHT in verdicts[other]
                cells[0 if first and second else 1 if first else 2 if second else 3] += 1
            found.append((labels[0], labels[other], cells))
        return found


def as_json(value: Any) -> Markup:
    """Return a value as JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    text = text.encode(errors="replace").decode()  # halves of surrogate pairs are no characters
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e"))


def views(boards: Sequence[Board], budget: int = BUDGET) -> list[View]:
    """Return the views of the boards whose samples were kept, with the texts of `BUDGET`."""
    made = [View(b, _rows(b)) for b in boards if any(b.tallies(m) for m in b.models)]
    for view in made:
        _fill(view, budget // len(made))
    return made


def _rows(board: Board) -> list[tuple[int, str, str, list[str]]]:
    tallies = [board.tallies(m) for m in board.models]
    problems = sorted({p for by in tallies for p in by})
    rows = []
    for problem in problems:
        model, tally = next(
            (m, by[problem]) for m, by in zip(board.models, tallies, strict=True) if problem in by
        )
        shared = len(model.prefix.get(board.name, ""))
        preview = " ".join(_TAG.sub(" ", tally.prompt[shared:]).split())
        verdicts = [by[problem].verdicts if problem in by else "" for by in tallies]
        rows.append((problem, tally.answer[:40], preview[:PREVIEW], verdicts))
    return rows


def _fill(view: View, budget: int) -> None:
    """Read texts, those that matter most first."""
    order = sorted(range(len(view.rows)), key=lambda row: (-view.gap(row), row))
    for choose in (_first, _other, _all):
        for row in order:
            for place, model in enumerate(view.board.models):
                tally = view.board.tallies(model).get(view.rows[row][0])
                if tally is None:
                    continue
                there = view.texts.get(row, Texts()).samples.get(place, {})
                for sample in choose(tally):
                    if budget <= 0:
                        return
                    if sample not in there and (record := model.record(tally.places[sample])):
                        budget -= _add(view, row, place, sample, record)


def _add(view: View, row: int, place: int, sample: int, record: Mapping[str, Any]) -> int:
    """Add a sample's text, and return the number of characters."""
    added = 0
    if (texts := view.texts.get(row)) is None:
        texts = view.texts[row] = Texts(shortened(as_text(record.get("prompt") or "")))
        added += len(texts.prompt)
    response = shortened(as_text(record.get("response") or ""))
    tokens = number(record.get("length"))
    texts.samples.setdefault(place, {})[sample] = (
        response, int(tokens) if tokens == tokens else None, record.get("truncated") is True,
    )  # fmt: skip
    return added + len(response)


def _first(tally: Tally) -> Iterator[int]:
    """Yield the first sample with the verdict that most have."""
    most = max(dict.fromkeys(tally.verdicts), key=tally.verdicts.count)
    yield tally.verdicts.index(most)


def _other(tally: Tally) -> Iterator[int]:
    """Yield the first sample of each verdict."""
    yield from (tally.verdicts.index(v) for v in dict.fromkeys(tally.verdicts))


def _all(tally: Tally) -> Iterator[int]:
    yield from range(len(tally.verdicts))

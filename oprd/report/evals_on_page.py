"""What the page's template needs of evaluations: tables of plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from oprd.report.boards import Board, differences, span
from oprd.report.collect import Collection
from oprd.report.evals import Model
from oprd.report.read import mapping, number

Table = dict[str, Any]
"""title, header, rows: (row's head, cells)."""


def tables(collection: Collection) -> list[Table]:
    """Return the tables of results, differences and closeness."""
    made = [_results(board) for board in collection.boards]
    for (baseline, label), values in differences(collection.boards).items():
        header = ["set", "points", "95 % interval", "better", "worse", "problems"]
        rows = [
            (
                v["set"],
                [
                    f"{100 * v['mean']:+.1f}",
                    "-" if v["low"] is None else f"{100 * v['low']:+.1f} to {100 * v['high']:+.1f}",
                    *(f"{v[name]:,}" for name in ("better", "worse", "problems")),
                ],
            )
            for v in values
        ]
        title = f"{label} against {baseline}, problem by problem"
        made.append({"title": title, "header": header, "rows": rows})
    models = [m for e in collection.evals for m in e.models]
    if close := [(m, n, c) for m in models for n, c in m.closeness.items()]:
        made.append(_closeness(close))
    return made


def _results(board: Board) -> Table:
    k = board.samples or "k"
    header = ["model"]
    if board.graded:
        header += [f"avg@{k} (%)", "95 % interval", f"best@{k} (%)", f"all@{k} (%)", "no box (%)"]
        header += ["no verdict"]
    header += ["dist-4g", "tokens", "truncated (%)", "problems"]
    rows = []
    for model in board.models:
        result = board.result(model)
        value, low, high, _ = span(board, model)
        cells = []
        if board.graded:
            every = mapping(result.get("pass_all")).get(str(k), result.get("avg"))
            cells = [_fixed(value), f"{low:.1f} to {high:.1f}" if low == low else "-"]
            cells += [_percent(x) for x in (result.get("best"), every, result.get("unboxed"))]
            cells += [_fixed(number(result.get("ungraded")), 0)]
        cells += [_fixed(number(result.get("dist_4g"))), _fixed(number(result.get("length")), 0)]
        cells += [_percent(result.get("truncated")), _fixed(number(result.get("problems")), 0)]
        rows.append((model.label, cells))
    return {"title": board.label, "header": header, "rows": rows}


def _closeness(found: Sequence[tuple[Model, str, dict[str, Any]]]) -> Table:
    header = ["model", "set", "KL student to teacher (nats)", "KL teacher to student (nats)"]
    header += ["top-k overlap (%)", "entropy (nats)", "teacher's entropy (nats)"]
    header += ["perplexity", "perplexity by the teacher", "cosine"]
    rows = []
    for model, name, c in found:
        cells = [name, *(_fixed(number(c.get(key)), 4) for key in ("kl", "kl_teacher"))]
        cells += [_percent(c.get("overlap"))]
        cells += [_fixed(number(c.get(key)), 3) for key in ("entropy", "teacher_entropy")]
        cells += [_fixed(number(c.get(key)), 2) for key in ("perplexity", "teacher_perplexity")]
        rows.append((model.label, [*cells, _fixed(number(c.get("cosine")), 4)]))
    return {"title": "Closeness to the teacher", "header": header, "rows": rows}


def settings(collection: Collection) -> Table:
    """Return the settings of all models. A row with one value for all has one cell."""
    models = [m for e in collection.evals for m in e.models]
    columns = []
    for model in models:
        own = dict(model.settings)
        for name, values in model.sets.items():
            own |= {f"{name}: {key}": value for key, value in values.items()}
        columns.append({k: _text(v) for k, v in own.items() if v is not None})
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "-") for column in columns]
        rows.append((name, cells[:1] if len(set(cells)) == 1 else cells))
    return {
        "title": "Settings", "header": ["setting", *(m.label for m in models)], "rows": rows,
    }  # fmt: skip


def _text(value: Any) -> str:
    if value == "":
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _fixed(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if value == value else "-"


def _percent(value: Any) -> str:
    return _fixed(100 * number(value))

"""Tables that describe a bridge."""

from __future__ import annotations

from oprd.bridge.bank import BridgeInfo
from oprd.models.info import ModelInfo
from oprd.observability.tables import TextTable

LAYER_HEADS = (
    "student\nlayer",
    "teacher\nlayer",
    "cosine\nbefore",
    "cosine\nafter",
    "variance\nkept",
    "student\nR2",
)
MEANING = (
    "Cosine: of the student's projected states with the teacher's, mean over held-out rows, before "
    "(with a random projector) and after the fit. Variance kept: the share of the teacher's "
    "variance that its directions hold. R2: the share of that which the student's map explains, on "
    "the rows fitted."
)


def tables(info: BridgeInfo) -> list[TextTable]:
    """Return two tables: the bridge's origin, and the quality of each layer at its full rank."""
    values = {
        "student": _model(info.student),
        "teacher": _model(info.teacher),
        "rank": str(info.rank),
        "solver": info.solver if info.ridge is None else f"{info.solver} {info.ridge:g}",
        "rows fitted": _or_dash(info.rows),
        "rows held out": _or_dash(info.held_out_rows),
        "states": "-" if info.shift is None else f"{info.positions} positions, {info.shift}",
        "teacher reads": info.teacher_input
        + (f", pairs {info.teacher_pairs}" if info.teacher_pairs else ""),
    }
    report = info.ranks[-1] if info.ranks else None
    title = "layers" if report is None else f"layers, at rank {report.rank}"
    rows = []
    for i, (student, teacher) in enumerate(info.pairs):
        cells = ["-"] * 4
        if report is not None:
            columns = (
                report.cosine_before,
                report.cosine_after,
                report.explained_variance,
                report.student_r2,
            )
            cells = [f"{column[i]:.4f}" for column in columns]
        rows.append([str(student), str(teacher), *cells])
    return [
        TextTable("bridge", ("", ""), list(values.items()), left=(0, 1)),
        TextTable(title, LAYER_HEADS, rows, [MEANING] if report else [], left=()),
    ]


def _model(model: ModelInfo) -> str:
    layers = "?" if model.layers is None else model.layers
    return f"{model.path or '-'} ({layers} layers, {model.width} wide)"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)

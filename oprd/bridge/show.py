"""Tables that describe a bridge."""

from __future__ import annotations

from rich.table import Table

from oprd.bridge.bank import BridgeInfo
from oprd.models.info import ModelInfo


def tables(info: BridgeInfo) -> list[Table]:
    """Return two tables: the bridge's origin, and the quality of each layer at its full rank."""
    about = Table(title="bridge", show_header=False)
    for name, value in {
        "student": _model(info.student),
        "teacher": _model(info.teacher),
        "rank": str(info.rank),
        "solver": info.solver if info.ridge is None else f"{info.solver} {info.ridge:g}",
        "rows fitted": _or_dash(info.rows),
        "rows held out": _or_dash(info.held_out_rows),
        "states": "-" if info.shift is None else f"{info.positions} positions, {info.shift}",
        "teacher reads": info.teacher_input
        + (f", pairs {info.teacher_pairs}" if info.teacher_pairs else ""),
    }.items():
        about.add_row(name, value)
    report = info.ranks[-1] if info.ranks else None
    title = "layers" if report is None else f"layers, at rank {report.rank}"
    layers = Table(title=title, caption="cosine: mean over held-out rows" if report else None)
    for name in ("student", "teacher", "cosine before", "after", "variance kept", "student R2"):
        layers.add_column(name, justify="right")
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
        layers.add_row(str(student), str(teacher), *cells)
    return [about, layers]


def _model(model: ModelInfo) -> str:
    layers = "?" if model.layers is None else model.layers
    return f"{model.path or '-'} ({layers} layers, {model.width} wide)"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)

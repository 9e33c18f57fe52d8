"""What ``oprd-gains`` shows on the screen: tables of at most 80 columns, with notes below them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from oprd.benchmark.report import (
    GIB,
    MEANING,
    MIB,
    PAPER_DIFFERENCES,
    conclusions,
    equal_note,
    equal_rows,
    label,
    mib,
    mode_title,
    number,
    paper_rows,
)
from oprd.benchmark.update import (
    BACKBONE_BACKWARD,
    BACKBONE_FORWARD,
    HEAD_BACKWARD,
    HEAD_FORWARD,
    LOSS,
    LOSS_BACKWARD,
    TEACHER_HEAD,
    TERM,
)
from oprd.memory_plan.shapes import Shape
from oprd.memory_plan.update import Moment
from oprd.observability.tables import TextTable

if TYPE_CHECKING:
    from oprd.benchmark.config import GainsConfig
    from oprd.benchmark.gains_plan import GainsPlan

TIME_HEADS = (
    "objective",
    "update\ns",
    "update\nx OPRD",
    "update x\nbackbone",
    "teacher's\nforward s",
    "step\ns",
    "step\nx OPRD",
)
EQUAL_HEADS = ("update\ns", "update\nx OPRD", "delta-peak\nMiB", "predicted\nMiB")
MEMORY_HEADS = ("objective", "delta-peak\nMiB", "x OPRD", "x backbone", "predicted\nMiB")
PARTS_HEADS = {
    "forward": {
        BACKBONE_FORWARD: "backbone",
        HEAD_FORWARD: "LM head",
        TEACHER_HEAD: "teacher's\nLM head",
        LOSS: "loss of\nlogits",
        TERM: "distillation\nterm",
    },
    "backward": {
        LOSS_BACKWARD: "loss of\nlogits",
        HEAD_BACKWARD: "LM head",
        BACKBONE_BACKWARD: "backbone",
    },
}
"""The heads of `oprd.benchmark.update.PARTS`, by table."""


def measured_tables(report: dict[str, Any], mode: str) -> list[TextTable]:
    """Make the tables of one mode: time, memory, and the parts of the time."""
    k, rows, title = report["config"]["k"], report["modes"][mode], mode_title(mode)
    names = [label(row["objective"], k) for row in rows]
    times = [
        [
            name,
            _rounded(row["seconds"]),
            number(row["time_to_oprd"], 3),
            number(row["time_to_backbone"], 3),
            _rounded(row["teacher_forward_seconds"]),
            _rounded(row["step_seconds"]),
            number(row["step_to_oprd"], 2),
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    memory = [
        [
            name,
            mib(row["delta_peak_bytes"]),
            number(row["memory_to_oprd"], 2),
            number(row["memory_to_backbone"], 2),
            mib(row["predicted_bytes"]),
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    tables = []
    if mode == "equal":
        equal_heads = ("objective", "blocks\nrecomputed", *EQUAL_HEADS)
        note = f"{equal_note(report['limit_bytes'])}."
        tables.append(TextTable(f"actor update, {title}", equal_heads, equal_rows(rows, k), [note]))
    tables += [
        TextTable(f"actor update, {title}: time", TIME_HEADS, times, [f"{MEANING}."]),
        TextTable(
            f"actor update, {title}: memory",
            MEMORY_HEADS,
            memory,
            ["delta-peak: what the update adds to what was resident before it."],
        ),
    ]
    for when, heads in PARTS_HEADS.items():
        cells = [
            [name, *(_seconds(row["parts"][part]) for part in heads)]
            for name, row in zip(names, rows, strict=True)
        ]
        notes = ["of the median round; the loss in chunks includes its backward."]
        notes += conclusions(rows, k) if when == "backward" else []
        shown = TextTable(
            f"where the {when} seconds go, {title}", ("objective", *heads.values()), cells, notes
        )
        tables.append(shown)
    return tables


def _rounded(seconds: float | None) -> str:
    return number(seconds, 2 if (seconds or 0) < 100 else 1)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value else "-"


def prediction_tables(cfg: GainsConfig, shape: Shape, plan: GainsPlan) -> list[TextTable]:
    """Make the tables of the predicted delta-peaks, one for each mode, their terms in the notes."""
    resident = ", ".join(f"{name} {mib(size)}" for name, size in plan.resident.items() if size)
    about = (
        f"{shape.parameters / 1e6:,.0f} M parameters, {cfg.batch} x {cfg.tokens} tokens, "
        f"{cfg.dtype}"
    )
    tables = []
    for mode, peaks in plan.peaks.items():
        rows = [
            [
                label(o, cfg.k),
                str(plan.blocks[mode][o]),
                mib(m.total),
                f"{m.total / peaks['oprd'].total:.2f}",
                m.name,
            ]
            for o, m in peaks.items()
        ]
        notes = [f"{equal_note(plan.limit)}."] if plan.limit is not None else []
        notes += [f"Resident beforehand, MiB: {resident}. The peaks, MiB:"]
        notes += _explained(((label(o, cfg.k), m) for o, m in peaks.items()), MIB, MIB, 0)
        tables.append(
            TextTable(
                f"predicted, {mode_title(mode)}\n{about}",
                ("objective", "blocks\nrec.", "delta-peak\nMiB", "x OPRD", "peaks at"),
                rows,
                notes,
                left=(0, 4),
            )
        )
    return tables


def paper_table() -> TextTable:
    """Make the table of the predictions for the paper's run, beside the paper's numbers."""
    rows = [
        [name, f"{moment.total / GIB:.1f}", number(reported, 1), moment.name]
        for name, moment, reported in paper_rows()
    ]
    notes = ["The peaks, GiB:"]
    notes += _explained(((name, moment) for name, moment, _ in paper_rows()), GIB, GIB / 20, 1)
    notes += ["Why the two differ:", *(f"- {line}" for line in PAPER_DIFFERENCES)]
    return TextTable(
        "the paper's run: R1-Distill-Qwen-1.5B, 32,768 tokens a rank, bf16, FSDP over 8",
        ("objective", "predicted\nGiB", "paper\nGiB", "peaks at"),
        rows,
        notes,
        left=(0, 3),
    )


def _explained(
    peaks: Iterable[tuple[str, Moment]], unit: float, least: float, digits: int
) -> list[str]:
    """Return a line for each different peak: the objectives that have it, and its terms."""
    named: dict[str, list[str]] = {}
    for name, moment in peaks:
        ordered = sorted(moment.terms.items(), key=lambda item: -item[1])
        terms = [f"{term} {size / unit:,.{digits}f}" for term, size in ordered if size >= least]
        named.setdefault(f"{moment.name} = {' + '.join(terms)}", []).append(name)
    return [f"- {'; '.join(names)}: {terms}" for terms, names in named.items()]

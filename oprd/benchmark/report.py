"""Report of ``oprd-gains`` as JSON and Markdown, and the paper's numbers for comparison."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from oprd.atomic_files import write_json, write_whole
from oprd.benchmark.gains_plan import MODE_TITLES
from oprd.benchmark.update import PARTS, Measured
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES
from oprd.memory_plan.shapes import Shape, Update
from oprd.memory_plan.update import Moment, moments, predict
from oprd.observability.memory import GIB

if TYPE_CHECKING:
    from oprd.benchmark.config import GainsConfig
    from oprd.benchmark.gains_plan import GainsPlan

MIB = 2**20

PAPER_SHAPE = Shape(
    d=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    intermediate=8960,
    vocab=151936,
    tied=False,
)
PAPER_GIB = {"opd_top1": 30.2, "opd_topk": 45.0, "oprd": 20.5}
"""Actor-update delta-peaks in the paper's Table 3, whose "GB" are GiB."""


def paper_update(rows_per_sequence: int) -> Update:
    """Return a rank's micro-batch in the paper: 2 x 16,384 tokens, bf16, FSDP over 8 GPUs."""
    return Update(
        batch=2,
        tokens=16384,
        rows=2 * rows_per_sequence,
        dtype_bytes=2,
        checkpointing=True,
        widen_head=False,
        shards=8,
    )


PAPER_LOGITS = 32768 * PAPER_SHAPE.vocab * 2
PAPER_STACK = PAPER_SHAPE.layers * 32768 * PAPER_SHAPE.d * 4

PAPER_DIFFERENCES = (
    "The paper's delta-peak also counts memory that is resident beforehand here: the gradients' "
    f"float32 shard ({PAPER_SHAPE.parameters * 4 / 8 / GIB:.1f} GiB) and the optimizer step's "
    "temporaries.",
    "The paper's OPRD still computes the student's logits and drops them: "
    f"{PAPER_LOGITS / GIB:.1f} GiB in bf16. It also casts every layer to float32 and stacks the "
    "layers padded, (B, L, T, d), before cutting to the last 2,000 tokens: "
    f"{PAPER_STACK / GIB:.1f} GiB. Ours does neither; the row 'OPRD with both' adds both to our "
    "prediction.",
    "The paper's OPD gets the teacher's log-probs of the sampled token or of k tokens. Ours reads "
    "the teacher's [B,T,V] logits, whose float32 rows are a named term. The paper's log-softmax "
    "for top-1 may be a fused cross-entropy (flash-attn's) without a float32 copy; ours makes "
    f"three more copies of {2 * PAPER_LOGITS / GIB:.1f} GiB each. Our materialised losses are "
    "therefore predicted above the paper's. At this size nobody should run them; in chunks, the "
    "same losses need what OPRD needs plus the head's gradient.",
    "The prediction assumes sequences of the full 16,384 tokens. Responses settled at 5,700 "
    "(OPRD) and 7,000 (OPD), but a maximum over ranks and steps is set by the longest.",
)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, thread count and library versions, for the report."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = _cpuinfo()
        name = next((ln.split(":")[1].strip() for ln in lines if "model name" in ln), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "oprd")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def label(objective: str, k: int) -> str:
    """Return an objective's title in tables."""
    return PLANNER_OBJECTIVES[objective].title.replace("top-k", f"top-{k}")


def summary(
    results: dict[str, Measured],
    teacher: dict[str, list[float]],
    peaks: dict[str, Moment],
    blocks: dict[str, int],
) -> list[dict[str, Any]]:
    """Make a row per objective: medians, ratios to OPRD, parts of the median round, prediction."""
    extra = None
    if "logprob" in results:
        extra = results["logprob"].seconds[_middle(results["logprob"].seconds)]
    rows: list[dict[str, Any]] = []
    for objective, measured in results.items():
        middle = _middle(measured.seconds)
        seconds = measured.seconds[middle]
        kind = PLANNER_OBJECTIVES[objective].teacher_outputs
        teacher_forward = median(teacher[kind]) if kind else None
        step = None
        if teacher_forward is not None:
            step = seconds + teacher_forward
            if PLANNER_OBJECTIVES[objective].is_materialised and extra is not None:
                step += extra
        delta = measured.delta_peaks[0] if measured.delta_peaks else None
        rows.append(
            {
                "objective": objective,
                "recomputed_blocks": blocks[objective],
                "seconds": seconds,
                "seconds_by_round": measured.seconds,
                "parts": {part: measured.parts[middle].get(part, 0.0) for part in PARTS},
                "delta_peak_bytes": delta,
                "predicted_bytes": peaks[objective].total,
                "predicted_at": peaks[objective].name,
                "predicted_terms": peaks[objective].terms,
                "teacher_forward_seconds": teacher_forward,
                "step_seconds": step,
            }
        )
    oprd = next(row for row in rows if row["objective"] == "oprd")
    backbone = next((row for row in rows if row["objective"] == "backbone"), None)
    for row in rows:
        for name, of in (
            ("seconds", "time"),
            ("delta_peak_bytes", "memory"),
            ("step_seconds", "step"),
        ):
            row[f"{of}_to_oprd"] = _ratio(row[name], oprd[name])
            if name != "step_seconds":
                other = backbone[name] if backbone else None
                row[f"{of}_to_backbone"] = _ratio(row[name], other)
    return rows


def _middle(seconds: list[float]) -> int:
    """Return the index of the median round (the lower of two), whose parts add up to its time."""
    order = sorted(range(len(seconds)), key=seconds.__getitem__)
    return order[(len(order) - 1) // 2]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def number(value: float | None, digits: int) -> str:
    """Format a number; None as ``-``."""
    return "-" if value is None else f"{value:,.{digits}f}"


def mib(size: float | None) -> str:
    """Format bytes as MiB; None as ``-``."""
    return number(None if size is None else size / MIB, 0)


FILES = ("gains.json", "gains.md")
HEADINGS = (
    "objective",
    "update s",
    "x OPRD",
    "x backbone",
    "delta-peak MiB",
    "x OPRD",
    "x backbone",
    "predicted MiB",
    "teacher s",
    "step s",
    "x OPRD",
)
MEANING = (
    "update: forward, loss and backward into existing gradients; step: update, the teacher's "
    "forward and, for materialised OPD, the log-prob forward"
)


def main_rows(rows: list[dict[str, Any]], k: int) -> list[list[str]]:
    """Format the rows as cells under `HEADINGS`."""
    return [
        [
            label(row["objective"], k),
            number(row["seconds"], 2),
            number(row["time_to_oprd"], 3),
            number(row["time_to_backbone"], 3),
            mib(row["delta_peak_bytes"]),
            number(row["memory_to_oprd"], 2),
            number(row["memory_to_backbone"], 2),
            mib(row["predicted_bytes"]),
            number(row["teacher_forward_seconds"], 2),
            number(row["step_seconds"], 2),
            number(row["step_to_oprd"], 2),
        ]
        for row in rows
    ]


def part_rows(rows: list[dict[str, Any]], k: int) -> list[list[str]]:
    """Format the seconds of each of `PARTS` in the median round."""
    cells = []
    for row in rows:
        parts = [row["parts"][part] for part in PARTS]
        shown = [f"{seconds:.3f}" if seconds else "-" for seconds in parts]
        cells.append([label(row["objective"], k), *shown])
    return cells


EQUAL_HEADINGS = (
    "objective",
    "blocks recomputed",
    "update s",
    "x OPRD",
    "delta-peak MiB",
    "predicted MiB",
)


def equal_rows(rows: list[dict[str, Any]], k: int) -> list[list[str]]:
    """Format what each objective makes of the same memory, under `EQUAL_HEADINGS`."""
    return [
        [
            label(row["objective"], k),
            str(row["recomputed_blocks"]),
            number(row["seconds"], 2),
            number(row["time_to_oprd"], 3),
            mib(row["delta_peak_bytes"]),
            mib(row["predicted_bytes"]),
        ]
        for row in rows
    ]


def equal_note(limit: int) -> str:
    """Say what the number of blocks was chosen for."""
    return (
        f"the fewest recomputed blocks with which the plan's delta-peak is at most {mib(limit)} "
        "MiB: what an objective saves in memory, it needs not recompute"
    )


def conclusions(rows: list[dict[str, Any]], k: int) -> list[str]:
    """State the cost of each distillation term."""
    lines = []
    for row in rows:
        term = row["parts"]["distillation term"]
        if term:
            statistics = row["predicted_terms"].get("rep rows' statistics", 0)
            lines.append(
                f"{label(row['objective'], k)}: the distillation term takes "
                f"{1000 * term:.1f} ms, {term / row['seconds']:.2%} of the update, and "
                f"{statistics / MIB:.2f} MiB of statistics"
            )
    return lines


def mode_title(mode: str) -> str:
    """Return a mode's name in titles."""
    return MODE_TITLES[mode]


def markdown(report: dict[str, Any]) -> str:
    """Format the report as a Markdown file."""
    cfg, shape = report["config"], report["shape"]
    shown = ", ".join(f"{name} {value}" for name, value in shape.items())
    about = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    resident = ", ".join(f"{n} {mib(s)} MiB" for n, s in report["resident_bytes"].items() if s)
    lines = [
        "# The actor update, measured",
        "",
        f"`{report['command']}`",
        "",
        f"- machine: {about}",
        f"- student: {report['parameters'] / 1e6:,.0f} M parameters, {cfg['dtype']}: {shown}",
        f"- {cfg['batch']} sequences of {cfg['tokens']} random tokens, {report['rows']} supervised",
        f"- median of {cfg['rounds']} rounds; memory from a round before them, in which freed "
        "tensors leave the process at once",
        f"- resident beforehand: {resident}",
        "- materialised: `model(input_ids).logits` and the teacher's ready [B,T,V] logits, as in "
        "TRL; verl passes log-probs instead, which saves the teacher's float32 rows. Chunked: the "
        "teacher's last states are ready, and its head runs in the chunks",
        f"- top-{cfg['k']}: the form of github.com/ShenzhiYang2000/OPRD, a detached advantage from "
        "full log-probs",
        f"- {MEANING}",
    ]
    for mode, rows in report["modes"].items():
        for title, headings, cells in (
            (mode_title(mode), HEADINGS, main_rows(rows, cfg["k"])),
            (
                f"where the seconds go, {mode_title(mode)}",
                ("objective", *PARTS),
                part_rows(rows, cfg["k"]),
            ),
        ):
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *markdown_table(headings, cells)]
        lines += ["", *(f"- {line}" for line in conclusions(rows, cfg["k"]))]
        if mode == "equal":
            lines += ["", *markdown_table(EQUAL_HEADINGS, equal_rows(rows, cfg["k"]))]
            lines += ["", f"- {equal_note(report['limit_bytes'])}"]
    return "\n".join(lines) + "\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, whose first column is of names."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (list(headings), rule, *rows)]


def paper_rows() -> list[tuple[str, Moment, float | None]]:
    """Return (label, prediction, the paper's GiB or None) for each row of the paper's table."""
    rows: list[tuple[str, Moment, float | None]] = []
    for objective in ("oprd", "opd_top1", "opd_topk", "opd_top1_chunked", "opd_topk_chunked"):
        update = paper_update(2000 if objective == "oprd" else 16384)
        moment = predict(objective, PAPER_SHAPE, update)
        if objective == "oprd":
            rows.append((label(objective, 16), moment, None))
            stored = moments(objective, PAPER_SHAPE, update)
            block = next(m for m in stored if m.name == "backward of a block")
            both = block.terms | {
                "logits [B,T,V]": PAPER_LOGITS,
                "float32 stack (B,L,T,d)": PAPER_STACK,
            }
            rows.append(("OPRD with both", Moment(block.name, both), PAPER_GIB[objective]))
        else:
            rows.append((label(objective, 16), moment, PAPER_GIB.get(objective)))
    return rows


def predictions(cfg: GainsConfig, command: str, shape: Shape, plan: GainsPlan) -> dict[str, Any]:
    """Return the predictions as plain values, and those for the paper's run; sizes in bytes."""
    return {
        "command": command,
        "config": asdict(cfg),
        "shape": asdict(shape),
        "parameters": shape.parameters,
        "resident_bytes": plan.resident,
        "modes": {
            mode: {
                name: _peak(moment) | {"recomputed_blocks": plan.blocks[mode][name]}
                for name, moment in peaks.items()
            }
            for mode, peaks in plan.peaks.items()
        },
        "paper": {
            name: _peak(moment) | {"paper_bytes": None if gib is None else int(gib * GIB)}
            for name, moment, gib in paper_rows()
        },
    }


def _peak(moment: Moment) -> dict[str, Any]:
    return {
        "predicted_bytes": moment.total,
        "predicted_at": moment.name,
        "predicted_terms": moment.terms,
    }


def make_report(
    cfg: GainsConfig,
    command: str,
    device: torch.device,
    shape: Shape,
    plan: GainsPlan,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Put together settings, predictions and what `oprd.benchmark.gains.measure` returned."""
    return {
        "command": command,
        "machine": machine(device),
        "config": asdict(cfg),
        "shape": {f.name: getattr(shape, f.name) for f in fields(shape)},
        "parameters": shape.parameters,
        "rows": cfg.batch * (cfg.tokens - cfg.prompt),
        "resident_bytes": plan.resident,
        "modes": {
            mode: summary(measured[mode], measured["teacher"], peaks, plan.blocks[mode])
            for mode, peaks in plan.peaks.items()
        },
        "limit_bytes": plan.limit,
    }


def write_report(report: dict[str, Any], output_dir: str | None) -> None:
    """Write ``gains.json`` and ``gains.md`` to ``output_dir``, if there is one."""
    if output_dir is None:
        return
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = (directory / name for name in FILES)
    write_json(as_json, report)
    write_whole(as_markdown, markdown(report))

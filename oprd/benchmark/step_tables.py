"""What ``oprd-gains --step`` shows: tables of at most 80 columns, with notes below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oprd.benchmark.report import mib, number
from oprd.benchmark.step_report import GPU_BOUND, length_note, noise_note
from oprd.benchmark.step_trainer import (
    BACKWARD,
    FORWARD,
    GAP,
    OPTIMIZER,
    PROFILED_TOKENS,
    REST,
    ROLLOUT,
    SYNC,
    TEACHER,
)
from oprd.observability.memory import GIB
from oprd.observability.tables import TextTable

PHASE_HEADS = {
    ROLLOUT: "roll-\nout",
    TEACHER: "tea-\ncher",
    FORWARD: "for-\nward",
    BACKWARD: "back-\nward",
    OPTIMIZER: "opti-\nmizer",
}
SYNC_HEAD, REST_HEAD, STEP_HEAD = "sync,\ncheck", "rest", "step"
TERA = 1e12


def tables(report: Mapping[str, Any]) -> list[TextTable]:
    """Make all tables of a measurement."""
    return [_ways(report), _phases(report), _speeds(report), _memory(report)]


def seconds(value: float) -> str:
    """Format seconds in at most five characters, up to 99,999."""
    digits = next((d for d, end in ((3, 9.9995), (2, 99.995), (1, 999.95)) if value < end), 0)
    return f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _ways(report: Mapping[str, Any]) -> TextTable:
    rows = []
    for row in report["rows"]:
        cells = [row["title"]]
        for way in ("update", "equal", "own"):
            cells += [seconds(row["ways"][way]), f"{row['ways_to_oprd'][way]:.2f}"]
        rows.append(cells)
    notes = [
        "update: forward, loss, backward and optimizer on the same rollouts for all, those of "
        "OPRD's steps. Equal: the step on these, so with OPRD's rollout and each objective's "
        "teacher and update. Own: the step as trained, at the lengths that each objective's "
        "student has.",
        f"{length_note(report)}.",
        f"{noise_note(report)}.",
    ]
    heads = ("objective", "update\ns", "x\nOPRD", "equal\ns", "x\nOPRD", "own\ns", "x\nOPRD")
    return TextTable("the three ways of counting a step, seconds", heads, rows, notes)


def _phases(report: Mapping[str, Any]) -> TextTable:
    synced = any(row["seconds"][SYNC] + row["seconds"][GAP] > 0 for row in report["rows"])
    rows = []
    for row in report["rows"]:
        s = row["seconds"]
        cells = [row["title"], *(seconds(s[phase]) for phase in PHASE_HEADS)]
        cells += [seconds(s[SYNC] + s[GAP])] if synced else []
        rows.append([*cells, seconds(s[REST]), seconds(row["ways"]["own"])])
    heads = ["objective", *PHASE_HEADS.values(), *([SYNC_HEAD] if synced else [])]
    notes = ["rest: the host between the phases. A chunked loss is computed in the forward."]
    if report["staleness"]:
        notes.append(
            "rollout: the wait for it alone, since the next step's responses are sampled meanwhile "
            "(rollout.staleness)."
        )
    if not synced and not report["samples_elsewhere"]:
        notes.append("no weight sync, no gap check: the engine samples with the student itself.")
    return TextTable(
        "seconds of a step by phase, as trained", [*heads, REST_HEAD, STEP_HEAD], rows, notes
    )


def _speeds(report: Mapping[str, Any]) -> TextTable:
    rows = [
        [
            row["title"],
            number(row["sampled_per_second"], 0),
            number(row["trained_per_second"], 0),
            number(row["tokens_per_second"], 0),
            _share(row["update_mfu"]),
            _share(row["step_mfu"]),
            _share(row["idle"]["update"]),
            _share(row["idle"]["step"]),
        ]
        for row in report["rows"]
    ]
    heads = (
        "objective",
        "sampled\ntok/s",
        "trained\ntok/s",
        "step\ntok/s",
        "MFU %\nupdate",
        "MFU %\nstep",
        "idle %\nupdate",
        "idle %\nstep",
    )
    idle = f"idle: {report['idle_is']}"
    if report["samples_elsewhere"]:
        idle += "; the engine's process is not seen, so only in teacher and update"
    elif report["idle_is"] == GPU_BOUND:
        idle += f"; from one more step with responses of up to {PROFILED_TOKENS} tokens"
    notes = [
        "sampled: response tokens a second of the rollout; trained: tokens, prompts included, a "
        "second of teacher and update; step: response tokens a second of the step.",
        f"MFU: of {report['peak_flops'] / TERA:,.2f} TFLOP/s, measured here with a "
        f"{report['peak_dtype']} matrix product; 6 FLOPs a weight and token in the update, 2 in "
        "teacher and rollout, and attention. Recomputation and padding don't count.",
        f"{idle}.",
    ]
    return TextTable("speed, as trained", heads, rows, notes)


def _memory(report: Mapping[str, Any]) -> TextTable:
    rows = [
        [
            row["title"],
            mib(row["delta_peak_bytes"]),
            number(row["memory_to_oprd"], 2),
            mib(row["predicted_bytes"]),
            str(row["recomputed_blocks"]),
            f"{row['response_length']:.1f}",
            _share(row["cut_share"]),
        ]
        for row in report["rows"]
    ]
    heads = (
        "objective",
        "delta-peak\nMiB",
        "x\nOPRD",
        "planned\nMiB",
        "blocks\nrecomputed",
        "response\ntokens",
        "cut\n%",
    )
    notes = [
        "delta-peak: what an update adds to what was resident before it, the largest of all steps; "
        "gradients count, since training frees them after each step. Planned: live tensors, for "
        "the longest prompt and response that occurred; a process on a CPU keeps freed memory too.",
        "cut: responses that were not ended by EOS within rollout.max_new_tokens.",
    ]
    return TextTable("memory of the update, and lengths", heads, rows, notes)


def prediction_table(predicted: Mapping[str, Any]) -> TextTable:
    """Make the table of a dry run."""
    rows = []
    for row in predicted["rows"]:
        flops = row["flops"] or {}
        cells = [
            f"{flops[n] / TERA:,.3g}" if flops else "-" for n in ("rollout", "teacher", "update")
        ]
        size = row["run_bytes"]
        total = "-" if size is None else f"{size / GIB:,.2f}"
        rows.append([row["title"], mib(row["predicted_bytes"]), total, *cells])
    rollout = predicted["config"]["rollout"]
    notes = [
        f"if every response has {rollout['max_new_tokens']:,} tokens (rollout.max_new_tokens) and "
        f"every prompt {predicted['config']['data']['max_prompt_tokens']:,}. Delta-peak: of the "
        "update; run: with what is resident. TFLOP: of one step, without recomputation. Seconds "
        "are not predicted: leave --dry_run out to measure them.",
        *(f"note: {note}" for note in predicted["notes"]),
        *(f"not checked: {item}" for item in predicted["unchecked"]),
    ]
    heads = (
        "objective",
        "delta-peak\nMiB",
        "run\nGiB",
        "rollout\nTFLOP",
        "teacher\nTFLOP",
        "update\nTFLOP",
    )
    return TextTable("predicted", heads, rows, notes)

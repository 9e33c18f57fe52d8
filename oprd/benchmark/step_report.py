"""The numbers of ``oprd-gains --step``, from what was measured; and its Markdown report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from oprd.atomic_files import write_json, write_whole
from oprd.benchmark.report import machine, markdown_table
from oprd.benchmark.step_config import OPRD, StepConfig
from oprd.benchmark.step_flops import Lengths, StepFlops, step_flops
from oprd.benchmark.step_plan import Prepared, delta_parts
from oprd.benchmark.step_trainer import PHASES, ROLLOUT, Measured, Step, samples_elsewhere
from oprd.config import TrainConfig
from oprd.observability.tables import TextTable

FILES = ("step.json", "step.md")
ALIKE = 0.02
"""Relative difference up to which the objectives' response lengths count as equal."""
GPU_BOUND = "share of the wall time in which no kernel runs"
CPU_BOUND = "1 - CPU seconds / (threads x wall seconds)"


def middle_steps(rounds: Sequence[Sequence[Step]]) -> list[Step]:
    """Return, for each step, that of the median round (of two, the faster)."""
    return [
        sorted(same, key=lambda step: step.wall)[(len(same) - 1) // 2]
        for same in zip(*rounds, strict=True)
    ]


def three_ways(own: Sequence[Step], equal: Sequence[Step], oprd: Sequence[Step]) -> dict:
    """Return the mean seconds of an objective, counted in three ways.

    Args:
        own: its steps as trained.
        equal: its updates on the rollouts of ``oprd``.
        oprd: the steps as trained of OPRD, which sampled these rollouts.

    Returns:
        ``update``: the student's update alone, on the shared rollouts. ``equal``: the step on
        these: what is outside teacher and update where they were sampled, and the objective's own
        teacher and update. ``own``: the step as trained.
    """
    outside = fmean(step.wall - step.inside for step in oprd)
    return {
        "update": fmean(step.update for step in equal),
        "equal": outside + fmean(step.inside for step in equal),
        "own": fmean(step.wall for step in own),
    }


def idle_shares(
    steps: Sequence[Step],
    on_gpu: bool,
    measured: tuple[float | None, float | None],
    threads: int,
    elsewhere: bool,
) -> dict[str, float | None]:
    """Return the idle share of update and step; None if unknown.

    On a GPU those measured in rollout and update are weighted by their seconds; in the rest of a
    step no kernel runs.

    Args:
        measured: (rollout, update), on a GPU.
        threads: the number of the CPU's threads.
        elsewhere: the rollouts run in another process, of which nothing is known.
    """
    wall = sum(step.wall for step in steps)
    inside = sum(step.inside for step in steps)
    if on_gpu:
        rollout, update = measured
        whole = None
        if rollout is not None and update is not None:
            sampling = sum(step.seconds[ROLLOUT] for step in steps)
            rest = wall - sampling - inside
            whole = (rollout * sampling + update * inside + rest) / wall
        return {"update": update, "step": whole}
    of_update = 1 - sum(step.cpu_inside for step in steps) / (threads * inside)
    of_step = 1 - sum(step.cpu for step in steps) / (threads * wall)
    return {"update": max(0.0, of_update), "step": None if elsewhere else max(0.0, of_step)}


def mean_flops(row: Prepared, steps: Sequence[Step]) -> StepFlops | None:
    """Return the mean FLOPs of these steps; None if the planner doesn't know the models."""
    if row.shape is None:
        return None
    each = [step_flops(row.cfg, *row.shape, step.lengths) for step in steps]
    return StepFlops(
        fmean(f.rollout for f in each),
        fmean(f.teacher for f in each),
        fmean(f.update for f in each),
    )


def speeds(
    steps: Sequence[Step], flops: StepFlops | None, peak: float, waits: bool = True
) -> dict[str, float | None]:
    """Return tokens a second, and the model FLOPs utilisation of update and step.

    ``sampled_per_second``: response tokens a second of the rollout. ``trained_per_second``: tokens,
    prompts included, a second of teacher and update. ``tokens_per_second``: response tokens a
    second of the whole step.

    Args:
        waits: the rollout's seconds are those of sampling; otherwise it goes on beside the update.
    """
    responses = sum(sum(step.lengths.responses) for step in steps)
    tokens = sum(sum(step.lengths.whole) for step in steps)
    wall = sum(step.wall for step in steps)
    sampling = sum(step.seconds[ROLLOUT] for step in steps)
    update = fmean(step.update for step in steps)
    return {
        "sampled_per_second": responses / sampling if waits and sampling else None,
        "trained_per_second": tokens / sum(step.inside for step in steps),
        "tokens_per_second": responses / wall,
        "update_mfu": None if flops is None else flops.update / (update * peak),
        "step_mfu": None if flops is None else flops.total / (wall / len(steps) * peak),
    }


def product_dtype(cfg: TrainConfig) -> torch.dtype:
    """Return the dtype of a run's matrix products, its options' defaults filled in."""
    return getattr(torch, cfg.autocast or cfg.student.dtype)


def make_report(
    rows: Sequence[Prepared],
    step: StepConfig,
    measured: Mapping[str, Measured],
    command: str,
    device: torch.device,
    peak: float,
) -> dict[str, Any]:
    """Put together settings, measurements and predictions as plain values; sizes in bytes."""
    cfg = rows[0].cfg
    threads, on_gpu = torch.get_num_threads(), device.type == "cuda"
    oprd = middle_steps(measured[OPRD].own)
    made = [_row(row, measured[row.name], oprd, device, threads, peak) for row in rows]
    base = made[0]
    for row in made:
        for name in ("update", "equal", "own"):
            row["ways_to_oprd"][name] = row["ways"][name] / base["ways"][name]
        row["memory_to_oprd"] = _ratio(row["delta_peak_bytes"], base["delta_peak_bytes"])
    return {
        "command": command,
        "machine": machine(device),
        "step": asdict(step),
        "config": _plain(asdict(cfg)),
        "peak_flops": peak,
        "peak_dtype": str(product_dtype(cfg)).removeprefix("torch."),
        "idle_is": GPU_BOUND if on_gpu else CPU_BOUND,
        "samples_elsewhere": samples_elsewhere(cfg),
        "staleness": cfg.rollout.staleness,
        "notes": list(rows[0].inputs.notes),
        "rows": made,
    }


def _plain(values: Any) -> Any:
    """Return values as JSON has them."""
    if isinstance(values, Mapping):
        return {str(k): _plain(v) for k, v in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(v) for v in values]
    return values if isinstance(values, str | int | float | bool | None) else str(values)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _row(
    row: Prepared,
    measured: Measured,
    oprd: Sequence[Step],
    device: torch.device,
    threads: int,
    peak: float,
) -> dict[str, Any]:
    own, equal = middle_steps(measured.own), middle_steps(measured.equal)
    flops = mean_flops(row, own)
    lengths = [n for step in own for n in step.lengths.responses]
    deltas = [s.delta_peak for steps in measured.own for s in steps if s.delta_peak is not None]
    read = [step.lengths for step in (*own, *equal)]
    plan = row.plan(
        device,
        max(max(n.prompts) for n in read),
        max(max(n.responses) for n in read),
        measured.recomputed,
    )
    parts = {} if plan is None else delta_parts(plan)
    elsewhere = samples_elsewhere(row.cfg)
    return {
        "objective": row.name,
        "title": row.title,
        "recomputed_blocks": measured.recomputed,
        "seconds": {phase: fmean(s.seconds[phase] for s in own) for phase in PHASES},
        "equal_seconds": {phase: fmean(s.seconds[phase] for s in equal) for phase in PHASES},
        "ways": three_ways(own, equal, oprd),
        "ways_to_oprd": {},
        **speeds(own, flops, peak, waits=row.cfg.rollout.staleness == 0),
        "flops": None if flops is None else asdict(flops),
        "idle": idle_shares(own, device.type == "cuda", measured.idle, threads, elsewhere),
        "delta_peak_bytes": max(deltas) if deltas else None,
        "predicted_bytes": sum(parts.values()) if parts else None,
        "predicted_terms": parts,
        "resident_terms": {} if plan is None else plan.resident,
        "response_length": fmean(lengths),
        "response_longest": max(lengths),
        "cut_share": sum(s.truncated for s in own) / len(lengths),
        "step_seconds_by_round": [[s.wall for s in steps] for steps in measured.own],
        "accuracy": {name: result.avg for name, result in measured.accuracy.items()},
        "timeline": None if measured.timeline is None else asdict(measured.timeline),
    }


def length_note(report: Mapping[str, Any]) -> str:
    """Say whether the objectives' own lengths differ."""
    lengths = {row["title"]: row["response_length"] for row in report["rows"]}
    base = report["rows"][0]["response_length"]
    wide = max(lengths, key=lambda name: abs(lengths[name] - base))
    apart, steps = lengths[wide] / base - 1, report["step"]["steps"]
    if abs(apart) <= ALIKE:
        return (
            f"after {steps} steps the responses' mean lengths are within {ALIKE:.0%} of OPRD's "
            f"(the furthest: {apart:+.1%}), so the last two ways differ by noise; they part when "
            "training changes the lengths: raise --step.steps"
        )
    return (
        f"mean response lengths over {steps} steps: {base:.1f} tokens (OPRD), {apart:+.1%} at most "
        f"({wide})"
    )


def noise_note(report: Mapping[str, Any]) -> str:
    """Say by how much measurements of the same differ."""
    ways = report["rows"][0]["ways"]
    apart = abs(ways["own"] / ways["equal"] - 1)
    twice = f"OPRD's equal and own steps are one and the same, measured twice, {apart:.0%} apart"
    if report["step"]["rounds"] < 2:
        return f"{twice}: a difference between objectives that is not well above that is noise"
    spreads = []
    for row in report["rows"]:
        sums = [sum(steps) for steps in row["step_seconds_by_round"]]
        spreads.append(max(sums) / min(sums) - 1)
    return (
        f"the same steps of an objective took up to {max(spreads):.0%} longer in one round than in "
        f"another, and {twice}: a difference between objectives that is not well above is noise"
    )


def predictions(rows: Sequence[Prepared], command: str, device: torch.device) -> dict[str, Any]:
    """Return what is predicted for responses of the greatest length: bytes and FLOPs."""
    made = []
    for row in rows:
        cfg = row.cfg
        prompt, response = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
        plan = row.plan(device, prompt, response)
        parts = {} if plan is None else delta_parts(plan)
        flops = None
        if row.shape is not None:
            count = cfg.rollout.prompts_per_step * cfg.rollout.responses_per_prompt
            lengths = Lengths([prompt] * count, [response] * count, [prompt + response] * count)
            flops = step_flops(cfg, *row.shape, lengths)
        made.append(
            {
                "objective": row.name,
                "title": row.title,
                "predicted_bytes": sum(parts.values()) if parts else None,
                "predicted_terms": parts,
                "resident_terms": {} if plan is None else plan.resident,
                "run_bytes": None if plan is None else plan.total,
                "flops": None if flops is None else asdict(flops),
            }
        )
    first = rows[0]
    return {
        "command": command,
        "config": _plain(asdict(first.cfg)),
        "rows": made,
        "notes": list(first.inputs.notes),
        "unchecked": list(first.inputs.unchecked),
    }


def markdown(
    report: Mapping[str, Any], tables: Sequence[TextTable], pictures: Mapping[str, str]
) -> str:
    """Format the report as a Markdown file.

    Args:
        pictures: files of pictures by their captions.
    """
    cfg, step = report["config"], report["step"]
    about = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    per_step = cfg["rollout"]["prompts_per_step"] * cfg["rollout"]["responses_per_prompt"]
    lines = [
        "# Whole training steps, measured",
        "",
        f"`{report['command']}`",
        "",
        f"- machine: {about}",
        f"- student: {cfg['student']['path']}, {cfg['student']['dtype']}; teacher: "
        f"{cfg['teacher']['path']}",
        f"- {per_step} responses a step of at most {cfg['rollout']['max_new_tokens']} tokens, "
        f"engine {cfg['rollout']['engine']}, seed {cfg['seed']}",
        f"- {step['rounds']} round{'s' * (step['rounds'] > 1)}, there and back over the "
        f"objectives; in each, {step['warmup']} to warm up and {step['steps']} measured steps. Of "
        "each step the median round (of two, the faster), then the mean over steps",
        "- evaluations, checkpoints, trackers and diagnostics are off",
        *(f"- note: {note}" for note in report["notes"]),
    ]
    for table in tables:
        heads = [head.replace("-\n", "").replace("\n", " ") for head in table.heads]
        lines += ["", f"## {table.title[0].upper()}{table.title[1:]}", ""]
        lines += markdown_table(heads, table.rows)
        lines += ["", *(f"- {note}" for note in table.notes)]
    for caption, file in pictures.items():
        lines += ["", f"![{caption}]({file})", "", caption]
    return "\n".join(lines) + "\n"


def write_report(
    report: Mapping[str, Any],
    tables: Sequence[TextTable],
    pictures: Mapping[str, str],
    directory: Path,
) -> None:
    """Write ``step.json`` and ``step.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = (directory / name for name in FILES)
    write_json(as_json, report)
    write_whole(as_markdown, markdown(report, tables, pictures))

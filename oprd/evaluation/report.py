"""Results of ``oprd-eval``: the file, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oprd.evaluation.evaluate import Sample, scored
from oprd.evaluation.metrics import Scored, description, over_sets, paired, result
from oprd.evaluation.store import Key
from oprd.observability.console import console
from oprd.observability.tables import TextTable
from oprd.observability.tables import show as print_tables


def by_problem(samples: Mapping[Key, Sample], name: str) -> dict[int, Scored]:
    """Return the statistics of each problem of a set."""
    problems: dict[int, list[Sample]] = {}
    for key in sorted(k for k in samples if k[0] == name):
        problems.setdefault(key[1], []).append(samples[key])
    return {problem: scored(given) for problem, given in problems.items()}


def set_results(problems: Mapping[int, Scored]) -> dict[str, Any]:
    """Return a model's results on a set, as plain values."""
    given = list(problems.values())
    if given[0].right is None:
        return description(given)
    return result(given).as_dict()


def comparisons(models: Mapping[str, Mapping[str, Mapping[int, Scored]]]) -> list[dict[str, Any]]:
    """Compare every model with the first, on each set that both have, and over these sets.

    Args:
        models: by model and set, the statistics of each problem.
    """
    (baseline, first), *others = models.items()
    found: list[dict[str, Any]] = []
    for label, sets in others:
        own: list[dict[str, Any]] = []
        for name in (n for n in first if n in sets):
            ours, theirs = (
                {i: p.accuracy for i, p in s[name].items() if p.right is not None}
                for s in (first, sets)
            )
            if ours.keys() & theirs.keys():
                difference = vars(paired(ours, theirs))
                own.append({"set": name, "baseline": baseline, "model": label} | difference)
        found += own
        if len(own) > 1 and all(d["low"] is not None for d in own):
            found.append(over_sets(own))
    return found


def tables(results: Mapping[str, Any], width: int = 80) -> list[TextTable]:
    """Return the tables of an evaluation's results, for a screen of ``width`` columns."""
    models = results["models"]
    names = list(dict.fromkeys(name for model in models.values() for name in model["sets"]))
    made = []
    for name in names:
        of_set = {label: m["sets"][name] for label, m in models.items() if name in m["sets"]}
        made.append(_set_table(name, of_set))
    if rows := [
        (label, name, close)
        for label, model in models.items()
        for name, close in model.get("closeness", {}).items()
    ]:
        made.append(_closeness_table(rows, results["teacher"]))
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for difference in results["comparisons"]:
        by_model.setdefault(difference["model"], []).append(difference)
    made += [_comparison_table(label, found) for label, found in by_model.items()]
    return [part for table in made for part in table.parts(width)]


def show(results: Mapping[str, Any]) -> None:
    """Print the tables."""
    print_tables(console, tables(results, console.width))


def _set_table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> TextTable:
    first = next(iter(rows.values()))
    n = first["samples"]
    failed = {label: r["ungraded"] for label, r in rows.items() if r.get("ungraded")}
    accuracy = [f"avg\n@{n} %", "\u00b1", f"best\n@{n}", f"all\n@{n}"] if "avg" in first else []
    boxes = ["no\nbox %"] if any(r.get("unboxed") is not None for r in rows.values()) else []
    lines = []
    for label, r in rows.items():
        cells = [label]
        if accuracy:
            all_right = r["pass_all"].get(str(n), r["avg"])
            cells += [_percent(x) for x in (r["avg"], r["stderr"], r["best"], all_right)]
        cells += [_percent(r.get("unboxed"))] if boxes else []
        cells += ["-" if r["dist_4g"] is None else f"{r['dist_4g']:.1f}", f"{r['length']:,.0f}"]
        lines.append([*cells, _percent(r["truncated"])])
    return TextTable(
        f"{name}: {first['problems']} problems x {n} samples",
        ["model", *accuracy, *boxes, "dist\n-4g", "tokens", "cut\n%"],
        lines,
        [f"no verdict on {count} samples of {label}" for label, count in failed.items()],
    )


def _closeness_table(rows: Sequence[tuple[str, str, Mapping[str, Any]]], teacher: str) -> TextTable:
    """Of models and sets: the numbers of `oprd.evaluation.closeness.Closeness`.

    H are entropies and PPL perplexities, of the model (s) and the teacher (t).
    """
    heads = [
        "model",
        "set",
        "KL\n(s|t)",
        "KL\n(t|s)",
        "over-\nlap %",
        "H\n(s)",
        "H\n(t)",
        "PPL\n(t)",
    ]
    lines = [
        [
            *(label, name, f"{c['kl']:.4f}", f"{c['kl_teacher']:.4f}", _percent(c["overlap"])),
            *(f"{c['entropy']:.2f}", f"{c['teacher_entropy']:.2f}"),
            f"{c['teacher_perplexity']:.2f}" if "teacher_perplexity" in c else "-",
            "-" if c["cosine"] is None else f"{c['cosine']:.4f}",
        ]
        for label, name, c in rows
    ]
    title = f"closeness to the teacher {teacher}"
    return TextTable(title, [*heads, "cosine"], lines, left=(0, 1))


def _comparison_table(label: str, differences: Sequence[Mapping[str, Any]]) -> TextTable:
    """Of a model and the baseline: the numbers of `oprd.evaluation.metrics.Difference`."""
    lines = [
        [
            *(d["set"], f"{100 * d['mean']:+.1f}"),
            *("-" if d[end] is None else f"{100 * d[end]:+.1f}" for end in ("low", "high")),
            *(str(d["better"]), str(d["worse"]), str(d["problems"])),
        ]
        for d in differences
    ]
    heads = ["set", "points", "95 %\nfrom", "\nto", "better", "worse", "problems"]
    return TextTable(
        f"{label} against {differences[0]['baseline']}, avg@n by problem", heads, lines
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

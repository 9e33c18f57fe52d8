"""Results of ``oprd-eval``: the file, and tables of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from oprd.evaluation.evaluate import Sample, scored
from oprd.evaluation.metrics import Scored, description, paired, result, t_quantile
from oprd.evaluation.store import Key

WIDTH = 80


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
            found.append(_over_sets(own))
    return found


def _over_sets(differences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of the sets' differences. Its variance is the mean of theirs over S."""
    errors = [(d["high"] - d["mean"]) / t_quantile(d["problems"] - 1) for d in differences]
    mean, count = fmean(d["mean"] for d in differences), len(differences)
    problems = sum(d["problems"] for d in differences)
    half = t_quantile(problems - count) * sqrt(sum(e * e for e in errors)) / count
    sums = {name: sum(d[name] for d in differences) for name in ("better", "worse", "problems")}
    return {
        **{"set": "mean of sets", "baseline": differences[0]["baseline"]},
        **{"model": differences[0]["model"], "mean": mean, "low": mean - half, "high": mean + half},
        **sums,
    }


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the tables of an evaluation's results, none wider than 80 columns."""
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
    if results["comparisons"]:
        made.append(_comparison_table(results["comparisons"]))
    return made


def show(results: Mapping[str, Any]) -> None:
    """Print the tables."""
    console = Console(highlight=False, width=WIDTH)
    for table in tables(results):
        console.print(table)
        console.print()


def _table(title: str, columns: Sequence[str], texts: int = 1) -> Table:
    """Return an empty table whose first columns are text, which may be cut, and others numbers."""
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False, box=None)
    for number, column in enumerate(columns):
        if number < texts:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _set_table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    first = next(iter(rows.values()))
    n = first["samples"]
    title = f"{name}: {first['problems']} problems x {n} samples"
    failed = {label: r["ungraded"] for label, r in rows.items() if r.get("ungraded")}
    accuracy = [f"avg@{n} %", "±", f"best@{n}", f"all@{n}"] if "avg" in first else []
    boxes = any(r.get("unboxed") is not None for r in rows.values())
    table = _table(
        title,
        ["model", *accuracy, "dist-4g", "tokens", "cut %", *(["no box %"] if boxes else [])],
    )
    for label, r in rows.items():
        cells = [label]
        if accuracy:
            all_right = r["pass_all"].get(str(n), r["avg"])
            cells += [_percent(x) for x in (r["avg"], r["stderr"], r["best"], all_right)]
        cells += ["-" if r["dist_4g"] is None else f"{r['dist_4g']:.1f}", f"{r['length']:,.0f}"]
        cells += [_percent(r["truncated"])] + ([_percent(r.get("unboxed"))] if boxes else [])
        table.add_row(*cells)
    notes = [f"no verdict on {count} samples of {label}" for label, count in failed.items()]
    table.caption = "; ".join(notes) or None
    return table


def _closeness_table(rows: Sequence[tuple[str, str, Mapping[str, Any]]], teacher: str) -> Table:
    """Of models and sets: the numbers of `oprd.evaluation.closeness.Closeness`."""
    columns = ["KL(s|t)", "KL(t|s)", "overlap %", "entropy", "teacher's", "cosine"]
    table = _table(f"closeness to the teacher {teacher}", ["model", "set", *columns], texts=2)
    for label, name, c in rows:
        cosine = "-" if c["cosine"] is None else f"{c['cosine']:.4f}"
        table.add_row(
            *(label, name, f"{c['kl']:.4f}", f"{c['kl_teacher']:.4f}", _percent(c["overlap"])),
            *(f"{c['entropy']:.3f}", f"{c['teacher_entropy']:.3f}", cosine),
        )
    return table


def _comparison_table(differences: Sequence[Mapping[str, Any]]) -> Table:
    baseline = differences[0]["baseline"]
    columns = ["model", "set", "points", "95 % interval", "better", "worse", "problems"]
    table = _table(f"avg@n compared with {baseline}, by problem", columns, texts=2)
    for d in differences:
        interval = "-"
        if d["low"] is not None:
            interval = f"{100 * d['low']:+.1f} .. {100 * d['high']:+.1f}"
        table.add_row(
            *(d["model"], d["set"], f"{100 * d['mean']:+.1f}", interval),
            *(str(d["better"]), str(d["worse"]), str(d["problems"])),
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

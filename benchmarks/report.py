"""Turns ``--benchmark-json`` output into a Markdown table and a plot.

pytest benchmarks/ --benchmark-only --benchmark-json runs/out.json
python -m benchmarks.report runs/out.json  # writes runs/benchmarks/out.md and .png
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

PEERS = ("eager", "compile", "upstream", "three sgemms", "liger")

GPU_TIMES = ", the device's; 'host ms': until the call returns"


@dataclass(frozen=True)
class Point:
    """One variant of one case."""

    regime: str
    m: int
    d: int
    dtype: str
    mode: str
    threads: int
    variant: str
    median: float
    floor_seconds: float
    extra_bytes: int | None
    activation_bytes: int
    floor_bytes: int
    host_seconds: float | None = None

    @property
    def case(self) -> tuple:
        return self.regime, self.m, self.d, self.dtype, self.mode, self.threads


def points_of(benchmarks: Iterable[dict]) -> list[Point]:
    """From the ``benchmarks`` of pytest-benchmark's JSON."""
    fields = [f for f in Point.__dataclass_fields__ if f != "median"]
    return [
        Point(median=b["stats"]["median"], **{f: b["extra_info"].get(f) for f in fields})
        for b in benchmarks
        if "regime" in b.get("extra_info", {})
    ]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def row(point: Point, others: dict[str, Point]) -> list[str]:
    """A line of the table: times as milliseconds, peers as how many times they take."""
    ratios = [
        f"{others[peer].median / point.median:.2f}x" if peer in others else "" for peer in PEERS
    ]
    extra, per_row = "", ""
    if point.extra_bytes is not None:
        extra = f"{point.extra_bytes / 2**20:.2f}"
        per_row = f"{point.extra_bytes / point.activation_bytes:.3f}"
    return [
        point.regime,
        f"{point.m:,}",
        str(point.d),
        point.dtype,
        point.mode,
        str(point.threads),
        point.variant,
        milliseconds(point.median),
        *([] if point.host_seconds is None else [milliseconds(point.host_seconds)]),
        f"{point.floor_bytes / point.median / 1e9:.3g}",
        f"{point.median / point.floor_seconds:.2f}x",
        *ratios,
        extra,
        per_row,
    ]


def markdown(points: list[Point], machine: dict) -> str:
    """One table: our variants with what the peers take beside them."""
    head = [
        *("regime", "M", "d", "dtype", "memory", "threads", "variant", "ms", "host ms"),
        *("GB/s", "of floor"),
        *(f"{peer} takes" for peer in PEERS),
        *("extra MiB", "extra / M d e"),
    ]
    on_gpu = any(p.host_seconds is not None for p in points)
    if not on_gpu:
        head.remove("host ms")
    lines = [
        "Machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "A row is one variant of a case: regime, rows M, width d, dtype, memory (warm: "
        "freed memory is used again; fresh: large tensors get new pages) and threads. Times are "
        "medians of variants run in turns"
        f"{GPU_TIMES if on_gpu else ''}. 'of floor': time over the least that this "
        "run's copy bandwidth and GEMM peak allow. 'GB/s': the bytes it cannot do without over the "
        "time. '... takes': that peer's time over ours.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for _, group in groupby(points, key=lambda p: p.case):
        variants = {p.variant: p for p in group}
        lines += [
            "| " + " | ".join(row(p, variants)) + " |"
            for name, p in variants.items()
            if name.startswith("oprd")
        ]
    return "\n".join(lines)


def plot(points: list[Point], path: Path) -> None:
    """Time over M, log-log, with the floor: one panel a regime that was run at several M."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [p for p in points if p.mode == "warm" and p.variant != "copy"]
    threads = max((p.threads for p in chosen), default=1)
    series: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for p in chosen:
        if p.threads != threads:
            continue
        panel = series.setdefault((f"{p.regime}, d = {p.d}", p.dtype), {})
        panel.setdefault(p.variant, []).append((p.m, p.median * 1e3))
        if p.variant == "oprd":
            panel.setdefault("floor", []).append((p.m, p.floor_seconds * 1e3))
    panels = {key: lines for key, lines in series.items() if len(lines["oprd"]) > 1}
    if not panels:
        return
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawn: dict[str, Any] = {}  # by name, so that all panels share one legend
    for axis, ((title, dtype), lines) in zip(axes.flat, panels.items(), strict=False):
        for name, values in lines.items():
            xs, ys = zip(*sorted(values), strict=True)
            style: dict[str, Any] = {"linestyle": "--", "color": "black"}
            if name != "floor":
                like = drawn.get(name)
                style = {"marker": "o", "color": like.get_color() if like else f"C{len(drawn)}"}
            (drawn[name],) = axis.plot(xs, ys, label=name, **style)
        axis.set(
            title=f"{title}, {dtype}", xlabel="rows M", ylabel="ms", xscale="log", yscale="log"
        )
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn))
    figure.suptitle(f"loss and gradient, {threads} threads, warm memory")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(json_file: Path, output_dir: Path = Path("runs/benchmarks")) -> None:
    """Write ``<name>.md`` and ``<name>.png`` for a benchmark run.

    Args:
        json_file: what ``--benchmark-json`` wrote.
        output_dir: where the two go; the default is not under version control.
    """
    content = json.loads(json_file.read_text())
    points = points_of(content["benchmarks"])
    if not points:
        raise SystemExit(f"{json_file} holds no benchmark of benchmarks/test_rep_loss.py")
    output_dir.mkdir(parents=True, exist_ok=True)
    table = output_dir / f"{json_file.stem}.md"
    table.write_text(markdown(points, content["machine_info"].get("oprd", {})) + "\n")
    picture = table.with_suffix(".png")
    plot(points, picture)
    print(table, picture if picture.exists() else "(no regime at several M: no plot)")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(report)

"""Markdown of what `benchmarks.on_gpu` has found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu_cases import PEERS

GROUPS = {
    "bridge": "Bridge: projected to r dimensions, loss and gradient in a new tensor",
    "identity": "Identity: the states themselves, loss and gradient",
    "layers": "Several layers in one call, M rows each",
}
ABOUT_TABLE = (
    "Microseconds. `B` (of `B us`): device time of loss and gradient, launch gaps between "
    "its kernels included, by CUDA graph replay (`*`: it can't be captured, and is queued behind "
    "a kernel that sleeps); in brackets the floor's share of it. `forward`: the loss alone. "
    "`host`: Python's time until the call returns. Inputs rotate through at least four times the "
    "L2 cache. Floor: the bytes that the work can't do without over this run's copy bandwidth, or "
    "its operations over this run's GEMM peak in the states' dtype (fp32: without TF32, which "
    "split products on tensor cores can beat), where larger. `extra`: peak MiB above what was in "
    "use, the gradient included. `-`: this backend does not do it."
)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without the columns that are empty in every line."""
    lines = [list(line) for line in lines]
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    rows = [[head[i] for i in kept], *([line[i] for i in kept] for line in lines)]
    out = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([out[0], "|" + "---|" * len(kept), *out[1:]])


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def kernel_tables(result: dict[str, Any]) -> str:
    """What `benchmarks.gpu_table` wrote."""
    ours = [b for b in ("cuda", "triton", "cpu") if any(r["variant"] == b for r in result["rows"])]
    gemm = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in result["rates"]["gemm"].items())
    parts = [
        f"Copy {result['rates']['copy'] / 1e12:.3g} TB/s; square products in TFLOP/s: {gemm}.",
        ABOUT_TABLE,
    ]
    for group, title in GROUPS.items():
        rows = [r for r in result["rows"] if r["group"] == group]
        if rows:
            parts += [f"### {title}", _pivot(rows, ours)]
    parts += [
        "### Host time of a call on 64 x 128 bf16, microseconds",
        table(
            ("call", "forward", "with backward"),
            ((r["call"], *(number(r.get(c)) for c in ("forward_us", "both_us")))
             for r in result["host"]),
        ),
    ]  # fmt: skip
    if result["left_out"]:
        parts.append(f"Left out for want of time: {'; '.join(result['left_out'])}.")
    if "stopped_by" in result:
        parts.append(f"Stopped by an error: {result['stopped_by']}")
    problems = {
        f"{r['what']}, {r['dtype']}, {r['variant']}: {r['problem']}"
        for r in result["rows"]
        if r["problem"] and not r["problem"].startswith("BackendUnavailable")
    }
    parts += [f"- failed: {problem}" for problem in sorted(problems)]
    return "\n\n".join(parts)


def _pivot(rows: Sequence[dict[str, Any]], ours: Sequence[str]) -> str:
    lines: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = row["what"], row["m"], row["dtype"]
        lines.setdefault(key, {})[row["variant"]] = row
    head = ["case", "M", "d", "dtype", "floor", *(f"{b} us" for b in ours)]
    head += [f"{p} us" for p in PEERS] + [f"{b} forward" for b in ours]
    head += [f"{b} host" for b in (*ours, "eager")] + [f"{b} extra" for b in (*ours, "eager")]
    return table(head, (_line(key, found, ours) for key, found in lines.items()))


def _line(key: tuple, found: dict[str, dict[str, Any]], ours: Sequence[str]) -> list[str]:
    what, m, dtype = key
    first = next(iter(found.values()))
    bound = "" if first["bound"] == "bytes" else " (FLOPs)"
    cells = [what, f"{m:,}", str(first["d"]), dtype, number(first["floor_us"]) + bound]
    cells += [_device(found.get(b)) or "-" for b in ours] + [_device(found.get(p)) for p in PEERS]
    cells += [number(found.get(b, {}).get("forward_us")) for b in ours]
    cells += [number(found.get(b, {}).get("host_us")) for b in (*ours, "eager")]
    extras = [found.get(b, {}).get("extra_bytes") for b in (*ours, "eager")]
    return cells + [number(None if e is None else e / 2**20) for e in extras]


def _device(row: dict[str, Any] | None) -> str:
    if row is None or row["device_us"] is None:
        return "failed" if row and not row["problem"].startswith("BackendUnavailable") else ""
    star = "*" if row["method"] == "queued" else ""
    return f"{number(row['device_us'])}{star} ({row['floor_us'] / row['device_us']:.2f})"


def dram_table(sections: Sequence[dict[str, Any]]) -> str:
    """What `benchmarks.dram` has counted."""
    lines = [
        (
            s["what"],
            f"{s['floor_bytes'] / 1e6:,.1f}",
            f"{s['read_bytes'] / 1e6:,.1f}",
            f"{s['write_bytes'] / 1e6:,.1f}",
            f"{(s['read_bytes'] + s['write_bytes']) / s['floor_bytes']:.3f}",
            ", ".join(s["kernels"]),
        )
        for s in sections
    ]
    head = ("call", "floor, MB", "DRAM read, MB", "DRAM written, MB", "of floor", "kernels")
    return table(head, lines)


def opd_table(opd: dict[str, Any]) -> str:
    """The losses from states to gradients, each way beside the others."""
    about = opd["about"]
    rows = (
        (
            row["form"],
            row["way"],
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['seconds'] / row['floor_seconds']:.2f}",
            "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:,.0f}",
            "" if row["difference"] is None else f"{row['difference']:.1e}",
        )
        for row in opd["rows"]
    )
    text = (
        f"{about['rows']:,} rows, d {about['width']}, V {about['vocab']:,}, {about['dtype']}; "
        f"{about['chunk']:,} rows a chunk. Floor: four GEMMs at {about['gemm_flops'] / 1e12:.3g} "
        "TFLOP/s. The last column is the relative difference of the gradients from oprd's."
    )
    heads = ("loss", "way", "ms", "x floor", "extra MiB", "difference")
    return f"{text}\n\n{table(heads, rows)}"


def document(results: dict[str, Any]) -> str:
    """results.md: machine, parts, and the tables of those parts that came to something."""
    machine = results["machine"]
    parts = results["parts"]
    out = [
        f"# {machine.get('gpu', 'No GPU')}",
        "Written by `bash benchmarks/on_gpu.sh OUT`. "
        + ", ".join(f"{name} {value}" for name, value in machine.items() if name != "gpu")
        + ".",
        table(
            ("part", "result", "s", ""),
            ((p["part"], p["status"], f"{p['seconds']:.0f}", p["note"]) for p in parts),
        ),
    ]
    if kernels := results.get("table"):
        out += ["## Kernels", kernel_tables(kernels)]
    if sections := results.get("ncu"):
        out += [
            "## Bytes through DRAM, by ncu",
            "`dram__bytes_read.sum` and `dram__bytes_write.sum` of all kernels of a call, each "
            "started with an empty L2 cache; what is written and stays in it is not counted.",
            dram_table(sections),
        ]
    if gains := results.get("gains"):
        out += ["## Actor update: `oprd-gains`", gains.replace("\n#", "\n###").lstrip("# ")]
    if opd := results.get("opd"):
        out += ["## Output-space losses: `python -m benchmarks.vocab_losses`", opd_table(opd)]
    return "\n\n".join(out) + "\n"

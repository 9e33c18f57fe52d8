"""Draw the headline figure from the measured tables: ``python docs/scripts/headline.py``.

Reads `benchmarks/results/h200.md` and `gains_h200_chunk_1760.md` and writes
``docs/assets/headline.svg``. Run it again after a new measurement.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = {"backbone alone": "#9e9e9e", "OPRD, all layers": "#3949ab"}


def rows(file: Path) -> dict[str, tuple[float, float]]:
    """Return seconds of an update and delta-peak in GiB by objective, from a table of oprd-gains.

    Raises:
        ValueError: if the file has no such table.
    """
    lines = iter(file.read_text().splitlines())
    head = next((line for line in lines if line.startswith("| objective | update s")), None)
    if head is None:
        raise ValueError(f"{file} has no table that begins with '| objective | update s'")
    names = [cell.strip() for cell in head.split("|")[1:-1]]
    seconds, peak = names.index("update s"), names.index("delta-peak MiB")
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found[cells[0]] = (float(cells[seconds]), float(cells[peak].replace(",", "")) / 1024)
    return found


def main() -> None:
    """Write the figure."""
    measured = rows(RESULTS / "h200.md")
    other = rows(RESULTS / "gains_h200_chunk_1760.md")
    bars = {
        "backbone alone": measured["backbone alone"],
        "OPRD, all layers": measured["OPRD, all layers"],
        "OPD top-16, logits in\nchunks of 128 tokens": measured["OPD top-16, chunked"],
        "OPD top-16, logits in\nchunks of 1,760 tokens": other["OPD top-16, chunked"],
        "OPD top-16, all logits": measured["OPD top-16, materialised"],
    }
    plt.rcParams |= {"svg.hashsalt": "oprd", "svg.fonttype": "path", "font.size": 9}
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 2.3), sharey=True, layout="constrained")
    colours = [COLOURS.get(name, "#ef9a9a") for name in bars]
    heads = ("student's update, seconds", "memory the update adds (delta-peak), GiB")
    for i, (axis, head) in enumerate(zip(axes, heads, strict=True)):
        values = [bar[i] for bar in bars.values()]
        drawn = axis.barh([*bars], values, color=colours)
        axis.bar_label(drawn, [f"{v:.2f}" if i == 0 else f"{v:.1f}" for v in values], padding=3)
        axis.set_title(head, fontsize=9, loc="left")
        axis.set_xlim(0, max(values) * 1.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    file = ROOT / "docs" / "assets" / "headline.svg"
    figure.savefig(file, metadata={"Date": None}, facecolor="white")
    print(file)


if __name__ == "__main__":
    main()

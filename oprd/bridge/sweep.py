"""The rank sweep (Fig. 12): cosine before and after fitting, at ranks 1, 2, 4, .. of one fit.

    oprd-bridge fit --rank 128 --output wide.safetensors
    oprd-bridge sweep wide.safetensors --output_dir sweep

A fit records its held-out cosines at all of these ranks, so the sweep runs no model.
"""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

from oprd.atomic_files import write_figure, write_json, write_whole
from oprd.bridge.bank import BridgeInfo, read_info
from oprd.errors import ConfigError
from oprd.observability.tables import TextTable
from oprd.output_paths import check_output_dir

COLUMNS = ("rank", "cosine_before", "cosine_after", "nmse_after", "explained_variance")
"""The columns that every rank has. The values are means over layers."""


def sweep_rows(info: BridgeInfo) -> list[dict[str, Any]]:
    """Return one row a rank: means over layers, and each layer's cosine after fitting.

    Raises:
        ConfigError: if the bridge records no cosines because it was imported.
    """
    if not info.ranks:
        raise ConfigError(
            f"this bridge (solver: {info.solver}) records no held-out cosines: fit one with "
            "oprd-bridge fit"
        )
    return [
        {
            "rank": report.rank,
            "cosine_before": statistics.mean(report.cosine_before),
            "cosine_after": statistics.mean(report.cosine_after),
            "nmse_after": 2 * (1 - statistics.mean(report.cosine_after)) / report.rank,
            "explained_variance": statistics.mean(report.explained_variance),
            "layers": {
                str(s): x for (s, _), x in zip(info.pairs, report.cosine_after, strict=True)
            },
        }
        for report in info.ranks
    ]


def table(rows: list[dict[str, Any]]) -> TextTable:
    """Return the table to print."""
    heads = [name.replace("_", "\n") for name in COLUMNS]
    cells = [[str(row["rank"]), *(f"{row[name]:.4f}" for name in COLUMNS[1:])] for row in rows]
    return TextTable("held-out cosine by rank, mean over layers", heads, cells, left=())


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Return the rows as CSV: COLUMNS, and one column a student layer (``layer_0``, ..)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    layers = list(rows[0]["layers"])
    writer.writerow([*COLUMNS, *(f"layer_{block}" for block in layers)])
    for row in rows:
        writer.writerow([*(row[c] for c in COLUMNS), *(row["layers"][block] for block in layers)])
    return text.getvalue()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the cosine before and after fitting over the rank, with a thin line for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    ranks = [row["rank"] for row in rows]
    for block in rows[0]["layers"]:
        values = [row["layers"][block] for row in rows]
        axis.plot(ranks, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    for name, colour in (("cosine_after", "tab:blue"), ("cosine_before", "tab:gray")):
        label = name.replace("cosine_", "") + " fitting"
        axis.plot(ranks, [row[name] for row in rows], "o-", color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(r) for r in ranks])
    axis.set(xlabel="rank r", ylabel="cosine on held-out rows")
    figure.legend(loc="outside upper center", ncols=2)
    write_figure(path, figure, dpi=110)
    plt.close(figure)


def sweep(bridge: str, output_dir: str) -> TextTable:
    """Write ``sweep.csv``, ``sweep.json`` and ``sweep.png``, and return the table to print.

    Args:
        bridge: a file that ``oprd-bridge fit`` wrote.
        output_dir: created if it does not exist. It must not contain files of these names.

    Raises:
        ConfigError: if ``bridge`` is not such a file, or if ``output_dir`` can't be used.
    """
    rows = sweep_rows(read_info(bridge))
    directory = Path(output_dir)
    files = {name: directory / f"sweep.{name}" for name in ("csv", "json", "png")}
    check_output_dir(directory, [file.name for file in files.values()])
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(files["csv"], to_csv(rows))
    write_json(files["json"], rows)
    plot(rows, files["png"])
    return table(rows)

"""Run the demo and draw what it prints: ``python docs/scripts/demo_picture.py``.

Writes ``docs/assets/demo.svg``. The demo really runs, half a minute on two cores; its numbers of
seconds are of the machine that this runs on. Arguments are passed to ``oprd-train``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.text import Text

from oprd.cli.train import main as train
from oprd.observability.console import console

ASSETS = Path(__file__).parents[1] / "assets"


def main() -> None:
    """Run ``oprd-train`` and write the picture."""
    console.record = True
    console.width = 88
    options = sys.argv[1:]
    console.print(Text.assemble(("$ ", "bold green"), (" ".join(["oprd-train", *options]), "bold")))
    with tempfile.TemporaryDirectory() as directory:
        train([*options, "--output_dir", f"{directory}/run"])
        svg = console.export_svg(title="oprd-train", unique_id="oprd-demo")
    # The run was in a directory that is gone; a user's is below runs/.
    file = ASSETS / "demo.svg"
    file.write_text(svg.replace(f"{directory}/run", "runs/demo"))
    print(file)


if __name__ == "__main__":
    main()

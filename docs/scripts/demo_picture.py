"""Run the demo and draw what it prints: ``python docs/scripts/demo_picture.py``.

Writes ``docs/assets/demo.svg``. The demo really runs, half a minute on two cores; its numbers of
seconds are of the machine that this runs on. Arguments are passed to ``oprd-train``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from rich.text import Text

from oprd.cli.train import main as train
from oprd.observability.console import console

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def main() -> None:
    """Run ``oprd-train`` and write the picture."""
    console.record = True
    console.width = 88
    options = sys.argv[1:]
    console.print(Text.assemble(("$ ", "bold green"), (" ".join(["oprd-train", *options]), "bold")))
    file = ASSETS.resolve() / "demo.svg"
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        train([*options, "--output_dir", "runs/demo"])
        os.chdir(ASSETS)
    file.write_text(console.export_svg(title="oprd-train", unique_id="oprd-demo"))
    print(file)


if __name__ == "__main__":
    main()

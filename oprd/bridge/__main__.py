"""``python -m oprd.bridge``, for torchrun."""

from oprd.bridge.cli import main
from oprd.distributed import run_main

run_main(main)

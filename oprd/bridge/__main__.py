"""``python -m oprd.bridge`` (and under torchrun ``-m oprd.bridge``) is ``oprd-bridge``."""

from oprd.bridge.cli import main

main()

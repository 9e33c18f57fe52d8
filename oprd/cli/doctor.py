"""``oprd-doctor``: a report on the installation: kernels, and what makes models fast here."""

from __future__ import annotations

import torch

from oprd.models.fast_parts import live_parts
from oprd_kernels import doctor


def report() -> str:
    """Return the text that ``oprd-doctor`` prints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "\n".join([doctor.report(), *live_parts(device)])


def main() -> None:
    """Print the report; the entry point of ``oprd-doctor``."""
    print(report())


if __name__ == "__main__":
    main()

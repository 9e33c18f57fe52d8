"""Environment set-up of the commands, and the conclusion of a dry run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence


def quiet_libraries() -> None:
    """Turn off progress bars and notices of libraries, which would mix with our own output."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def print_conclusion(what: str, notes: Iterable[str], unchecked: Sequence[str]) -> None:
    """Print the last lines of a dry run without errors.

    Args:
        what: what was checked, for the message.
        notes: what the user should know.
        unchecked: what could not be checked.
    """
    for note in notes:
        print(f"note: {note}")
    for item in unchecked:
        print(f"not checked: {item}")
    if unchecked:
        print("the configuration is consistent as far as it could be checked from here")
    else:
        print(f"everything checked: {what} can start")

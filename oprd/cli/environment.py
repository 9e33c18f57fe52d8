"""Environment set-up of the commands, and the conclusion of a dry run."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterable, Sequence

import huggingface_hub.constants


def hub_reachable(timeout: float = 3.0) -> bool:
    """Return whether the hub can be reached. Behind a proxy, assume that it can."""
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    host = endpoint.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=timeout).close()
    except OSError:
        return False
    return True


def leave_out_an_unreachable_hub() -> None:
    """Switch the libraries to offline mode if the hub can't be reached.

    Otherwise they would retry for minutes.
    """
    if not hub_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # it may have been read already


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

"""The Hugging Face hub: whether it can be reached, and the libraries' offline mode if not.

`huggingface_hub` has no option for its retries: without a network it tries each file for half a
minute and more. In offline mode it looks into its cache alone.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

from huggingface_hub import constants

_set_by_us = False  # whether offline mode is on because of `leave_out_if_unreachable`


def reachable(seconds: float = 4.0) -> bool:
    """Return whether the hub can be reached. Behind a proxy, assume that it can.

    Args:
        seconds: the longest time to wait, for name servers too.
    """
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (80 if place.scheme == "http" else 443)
    connected = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((place.hostname or "", port), timeout=seconds).close()
            connected.set()

    # In a thread, because the time limit of a connection does not hold for looking up the name.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return connected.is_set()


@lru_cache(maxsize=1)
def _reachable_in(_minute: int) -> bool:
    return reachable()


def leave_out_if_unreachable() -> None:
    """Turn on the libraries' offline mode if the hub can't be reached, and off when it can again.

    Call it before a library looks something up there. The answer holds for a minute. If the user
    has turned on offline mode (``HF_HUB_OFFLINE=1``), it stays on.
    """
    global _set_by_us
    if constants.HF_HUB_OFFLINE and not _set_by_us:
        return
    offline = not _reachable_in(int(time.monotonic() // 60))
    if offline == _set_by_us:
        return
    _set_by_us = constants.HF_HUB_OFFLINE = offline
    os.environ["HF_HUB_OFFLINE"] = str(int(offline))  # for processes that this one starts
    if "datasets" in sys.modules:  # it has a copy
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline


def why_unreachable() -> str:
    """Say why nothing came from the hub, for a message."""
    if constants.HF_HUB_OFFLINE and not _set_by_us:
        return "HF_HUB_OFFLINE=1 keeps it from being looked up on the hub"
    return f"the hub ({constants.ENDPOINT}) can't be reached"

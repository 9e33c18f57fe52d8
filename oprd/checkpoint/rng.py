"""A rank's random states as one tensor."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oprd.checkpoint.state import packed, unpacked


def capture(device: torch.device) -> Tensor:
    """Return the random states of Python, NumPy and torch (CPU and GPU) as a uint8 CPU tensor."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [_hex(torch.from_numpy(np.asarray(keys))), position, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _hex(torch.cuda.get_rng_state(device))
    return packed(state)


def restore(captured: Tensor, device: torch.device) -> None:
    """Set the random states that `capture` returned, including a GPU's if it was captured."""
    state = unpacked(captured)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(
        ("MT19937", np.frombuffer(bytes.fromhex(keys), np.uint32), position, has_gauss, cached)
    )
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _hex(tensor: Tensor) -> str:
    return tensor.numpy().tobytes().hex()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

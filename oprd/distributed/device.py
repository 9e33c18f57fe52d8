"""Choice of the device that a run computes on."""

from __future__ import annotations

import torch

from oprd.errors import ConfigError


def check_device(name: str) -> torch.device:
    """Return the device that ``device=name`` selects.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but torch sees no GPU: use device=cpu")
    return device

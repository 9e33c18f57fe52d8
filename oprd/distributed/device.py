"""The device that a run asks for."""

from __future__ import annotations

import torch

from oprd.errors import ConfigError


def check_device(name: str) -> torch.device:
    """The device that ``device=name`` means.

    Raises:
        ConfigError: if there is none of that name.
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

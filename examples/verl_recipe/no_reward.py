"""A reward function for prompts that have no answer to compare a response with."""

from typing import Any


def no_reward(*_: Any, **__: Any) -> float:
    """Return 0: the representation loss needs no reward."""
    return 0.0

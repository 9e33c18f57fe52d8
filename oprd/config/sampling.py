"""How responses are sampled, by whichever engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling from the model's own distribution; top-k sampling and penalties are off.

    Attributes:
        max_new_tokens: a response is cut there.
        temperature: 0: greedy decoding.
        top_p: 1: off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

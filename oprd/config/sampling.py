"""Sampling parameters, shared by all engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling. Top-k sampling and penalties are off.

    Attributes:
        max_new_tokens: maximum length of a response in tokens; longer responses are cut off.
        temperature: sampling temperature; 0: greedy decoding.
        top_p: nucleus sampling probability; 1: off.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

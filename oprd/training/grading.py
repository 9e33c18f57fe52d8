"""Graders: ``exact`` compares text, ``math`` compares the boxed answer mathematically."""

from __future__ import annotations

from collections.abc import Callable

from math_verify import LatexExtractionConfig, StringExtractionConfig, parse, verify

Grader = Callable[[str, str], bool]


def exact(response: str, answer: str) -> bool:
    """Return whether response and answer are equal, ignoring white space at both ends."""
    return response.strip() == answer.strip()


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{..}``, or None if there is no complete box."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _parse(expression: str) -> list:
    configs = [LatexExtractionConfig(), StringExtractionConfig()]
    return parse(f"\\boxed{{{expression}}}", extraction_config=configs)


def math(response: str, answer: str) -> bool:
    """Return whether the last boxed expression of the response equals the answer.

    The comparison is mathematical: "142" equals "142.0". A response without a complete box is
    wrong.
    """
    boxed = last_boxed(response)
    if boxed is None:
        return False
    return boxed.strip() == answer.strip() or bool(verify(_parse(answer), _parse(boxed)))


GRADERS: dict[str, Grader] = {"exact": exact, "math": math}

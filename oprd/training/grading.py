"""Is a response right? ``exact``: the text; ``math``: mathematical equality of the boxed answer."""

from __future__ import annotations

from collections.abc import Callable

from math_verify import LatexExtractionConfig, StringExtractionConfig, parse, verify

Grader = Callable[[str, str], bool]


def exact(response: str, answer: str) -> bool:
    """Whether the response is the answer, white space at the ends aside."""
    return response.strip() == answer.strip()


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{..}``, braces balanced; None if there is none."""
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
    """Whether the last boxed expression of the response equals the answer ("142" and "142.0" do).

    A response without a complete box is wrong.
    """
    boxed = last_boxed(response)
    if boxed is None:
        return False
    return boxed.strip() == answer.strip() or bool(verify(_parse(answer), _parse(boxed)))


GRADERS: dict[str, Grader] = {"exact": exact, "math": math}

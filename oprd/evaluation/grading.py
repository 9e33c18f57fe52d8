"""Graders: ``exact`` compares text, ``math`` compares the boxed answer mathematically.

`math` may take long or never return: `oprd.evaluation.grader_pool` calls it in other processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Grader = Callable[[str, str], bool]

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
WHOLE = re.compile(r"([-+]?\d+)(?:\.0*)?")
SCIENTIFIC = re.compile(rf"({NUMBER})[eE]([-+]?\d+)")
WITH_UNIT = re.compile(rf"({NUMBER})\s+[A-Za-z]{{2,}}(?:\s[A-Za-z]+)*")
TEXT_NUMBER = re.compile(rf"\\(?:text|mathrm|textbf)\{{\s*({NUMBER}[^{{}}]*)\}}")
THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!;: ]|\s)+(?=\d{3}(?!\d))")


def exact(response: str, answer: str) -> bool:
    """Return whether response and answer are equal, ignoring white space at both ends."""
    return response.strip() == answer.strip()


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{..}`` that is not empty.

    Returns:
        None if there is no box, or if the last one is not complete.
    """
    for match in reversed(list(BOX.finditer(text))):
        depth = 0
        for i in range(match.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                break
        else:
            return None
        if content := text[match.end() : i].strip():
            return content
    return None


def tidy(expression: str) -> str:
    """Rewrite spellings of an answer that math-verify does not read.

    These are a full stop at the end, ``°``, spaces between thousands, ``1e3``, and a unit in words
    behind a number. Doubled braces are removed, and of a worked solution its box is kept.
    """
    if BOX.search(expression):
        expression = last_boxed(expression) or expression
    text = expression.strip().strip("$").strip().rstrip(".").strip()
    while text.startswith("{") and text.endswith("}") and _is_one_group(text):
        text = text[1:-1].strip()
    if match := TEXT_NUMBER.fullmatch(text):
        text = match[1].strip()
    text = THOUSANDS.sub("", text.replace("°", r"^\circ"))
    if match := SCIENTIFIC.fullmatch(text):
        return rf"{match[1]} \times 10^{{{match[2]}}}"
    if match := WITH_UNIT.fullmatch(text):
        return match[1]
    return text


def _is_one_group(text: str) -> bool:
    """Return whether the first brace of a text is closed by its last one."""
    depth = 0
    for i, c in enumerate(text):
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth == 0:
            return i == len(text) - 1
    return False


def quick_verdict(boxed: str, answer: str) -> bool | None:
    """Decide about equal texts and whole numbers; return None where math-verify has to decide."""
    boxed, answer = tidy(boxed), tidy(answer)
    if boxed == answer:
        return bool(boxed)
    numbers = [WHOLE.fullmatch(text) for text in (boxed, answer)]
    if numbers[0] and numbers[1]:  # as text: int() refuses more than 4300 digits
        signed = [(n[1].lstrip("+-0"), n[1].startswith("-")) for n in numbers if n]
        return signed[0] == signed[1] or not (signed[0][0] or signed[1][0])
    return None


def equal(boxed: str, answer: str) -> bool:
    """Return whether two expressions are mathematically equal. May hang: math-verify's own time
    limits, which need the main thread, are off."""
    quick = quick_verdict(boxed, answer)
    if quick is not None:
        return quick
    from math_verify import verify

    gold, given = _parse(tidy(answer)), _parse(tidy(boxed))
    return bool(verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True))


def _parse(expression: str) -> list:
    from math_verify import LatexExtractionConfig, StringExtractionConfig, parse

    configs = [LatexExtractionConfig(), StringExtractionConfig()]
    return parse(f"\\boxed{{{expression}}}", extraction_config=configs, parsing_timeout=None)


def math(response: str, answer: str) -> bool:
    """Return whether the last boxed expression of the response equals the answer.

    The comparison is mathematical: "142" equals "142.0". A response without a complete box is
    wrong.
    """
    boxed = last_boxed(response)
    return boxed is not None and equal(boxed, answer)


GRADERS: dict[str, Grader] = {"exact": exact, "math": math}

"""Fonts for the texts of a chart: matplotlib's own lacks most of the world's scripts."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable
from typing import Any, TypeVar

OWN = "DejaVu Sans"
"""The font that matplotlib brings along."""

_NO_LETTERS = ("Last Resort", "cmb", "cmex", "cmmi", "cmr", "cmss", "cmsy", "cmti", "cmtt")
"""Beginnings of the names of fonts with other signs in the places of letters."""

T = TypeVar("T")


def drawable(value: T) -> tuple[list[str], T]:
    """Return fonts for the texts of a chart, and the chart with texts that these fonts have.

    If some characters are missing in matplotlib's font, this machine's other fonts are tried. A
    character that none has is written as its code, ``<U+6F22>``, so that names stay apart.
    """
    wanted = {ord(c) for text in _texts(value) for c in text} - {ord("\n")}
    if not (missing := wanted - characters(OWN)):
        return [OWN], value
    families, odd = [OWN], {c for c in missing if not chr(c).isprintable()}
    missing -= odd
    for family in _families() if missing else ():
        if found := missing & characters(family):
            families.append(family)
            missing -= found
    codes = {c: f"<U+{c:04X}>" for c in missing | odd}
    return families, (_translated(value, codes) if codes else value)


@functools.lru_cache(maxsize=512)
def characters(family: str) -> frozenset[int]:
    """Return the characters that a font has, as code points; none if it can't be read."""
    from matplotlib import font_manager, ft2font

    # A log record of matplotlib's, on a font that is only looked at, would reach the user.
    logger = logging.getLogger("matplotlib.font_manager")
    level, logger.level = logger.level, logging.ERROR
    try:
        file = font_manager.findfont(family, fallback_to_default=False)
        return frozenset(ft2font.FT2Font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
    finally:
        logger.level = level


def _families() -> list[str]:
    from matplotlib import font_manager

    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return sorted(name for name in names if name != OWN and not name.startswith(_NO_LETTERS))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from _texts(getattr(value, part.name))
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            if not isinstance(part, float):
                yield from _texts(part)


def _translated(value: Any, codes: dict[int, str]) -> Any:
    """Return a value with all its texts translated."""
    if isinstance(value, str):
        return value.translate(codes)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kept = {name: _translated(part, codes) for name, part in parts.items() if name != "key"}
        return dataclasses.replace(value, **kept)
    if isinstance(value, dict):
        return {_translated(k, codes): _translated(v, codes) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_translated(part, codes) for part in value)
    return value

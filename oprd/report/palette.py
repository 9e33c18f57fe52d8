"""Colours, dashes and symbols by group, apart without colour vision, on a light and a dark page.

The hues are those of Okabe and Ito, darkened or lightened until each has a contrast of at least 3:1
with its page. Dashes and symbols repeat with other periods, so that no two of 42 lines, and of 56
points, look alike.
"""

from __future__ import annotations

LIGHT = ("#0072b2", "#d55e00", "#008a63", "#a8508a", "#4d4d4d", "#9a6a00", "#2a8cc4")
DARK = ("#4aa8e8", "#ff8a4c", "#2fcb9a", "#e59acb", "#c8c8c8", "#f0c040", "#9ad4f5")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "cross": "P",
    "star": "*", "pentagon": "p",
}  # fmt: skip
STROKES = {
    "solid": "", "dash": "9 5", "dot": "2 4", "dashdot": "9 4 2 4", "longdash": "14 5",
    "longdashdot": "14 4 2 4",
}  # fmt: skip
"""Lengths of dashes and gaps, for SVG and matplotlib."""

PATTERNS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("", ()), ("/", (135,)), ("\\", (45,)), ("-", (0,)), ("|", (90,)), ("x", (45, 135)),
)  # fmt: skip
"""Patterns of bars, as plotly names them and as angles of stripes in degrees."""
HATCHES = ("", "//", "\\\\", "--", "||", "xx")
"""The same for matplotlib."""
PATTERN_INK = "rgba(0,0,0,0.45)"

INK, GRID, REFERENCE = ("#1c2128", "#e8eaed"), ("#d4d9e0", "#3c434d"), ("#5a6470", "#a6b0bc")
"""(light, dark) colours of text, grid and reference lines."""


def colour(group: int) -> str:
    """Return a group's colour on a light page; -1 is a reference line's."""
    return REFERENCE[0] if group < 0 else LIGHT[group % len(LIGHT)]


def dash(group: int) -> str:
    """Return a group's dashes, as plotly names them."""
    return "solid" if group < 0 else DASHES[group % len(DASHES)]


def symbol(group: int) -> str:
    """Return a group's symbol, as plotly names it."""
    return SYMBOLS[max(group, 0) % len(SYMBOLS)]


def rgb(colour: str) -> str:
    """Return ``#rrggbb`` as ``"r,g,b"``."""
    return ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


def clear(colour: str, alpha: float) -> str:
    """Return a colour that shows what is behind it."""
    return f"rgba({rgb(colour)},{alpha})"


def dark_of() -> dict[str, str]:
    """Return, for each colour of a figure on a light page, the one on a dark page."""
    pairs = [*zip(LIGHT, DARK, strict=True), INK, GRID, REFERENCE]
    both = dict(pairs)
    return both | {f"rgba({rgb(light)},": f"rgba({rgb(dark)}," for light, dark in pairs}

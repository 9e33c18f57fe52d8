"""Texts in scripts that matplotlib's font lacks."""

import warnings

import pytest

from oprd.report import fonts
from oprd.report.chart import Interval, Intervals, Line, LineChart, StackedBars
from oprd.report.fonts import OWN, characters, drawable
from oprd.report.png import write_png

NAMES = ["\u84b8\u998f", "\u84b8", "a\x00b\tc", "\U0001f600 \u0928", "plain \u00b1\u00e9", "\ud83d"]


def charts():
    items = [Interval(n, i, 1.0, 0.5, 1.5) for i, n in enumerate(NAMES)]
    lines = [Line(n, i, [0.0, 1.0], [0.0, 1.0]) for i, n in enumerate(NAMES)]
    return [
        Intervals("a", "s", "\u84b8", "\u998f", "y", items=items, references=[("\u5148", 1.2)]),
        LineChart("b", "s", "t", "x", "y", lines=lines),
        StackedBars("c", "s", "t", "x", "y", labels=NAMES, parts={"\u90e8": [1.0] * len(NAMES)}),
    ]


def test_no_text_is_too_foreign_for_a_picture(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chart in charts():
            write_png(chart, tmp_path / f"{chart.key}.png")
            assert (tmp_path / f"{chart.key}.png").stat().st_size > 5000


def test_what_no_font_has_is_written_as_its_code(monkeypatch):
    monkeypatch.setattr(fonts, "_families", lambda: [])
    families, chart = drawable(charts()[0])
    assert families == [OWN]
    labels = [item.label for item in chart.items]
    assert labels[:3] == ["<U+84B8><U+998F>", "<U+84B8>", "a<U+0000>b<U+0009>c"]
    assert labels[4] == NAMES[4]
    assert (chart.title, chart.references) == ("<U+84B8>", [("<U+5148>", 1.2)])
    assert [item.value for item in chart.items] == [1.0] * len(NAMES)


def test_another_font_is_used_where_it_has_the_characters():
    if not (more := characters("STIXGeneral") - characters(OWN)):
        pytest.skip("matplotlib's fonts have other characters now")
    letter = chr(min(c for c in more if chr(c).isprintable()))
    families, title = drawable(f"{letter} a")
    assert title == f"{letter} a"
    assert len(families) == 2


def test_a_font_that_is_not_there_has_no_characters():
    assert characters("no such font") == frozenset()

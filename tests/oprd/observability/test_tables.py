"""Tables and lines on a terminal of 80 columns and in a log."""

import io
import logging
import re
import time

import pytest
from rich.console import Console

from oprd.observability import progress, run_log
from oprd.observability.run_log import RunLog, closing_tables, step_line
from oprd.observability.summary import EvalResult
from oprd.observability.tables import TextTable
from tests.support.screens import check_fits, rendered

STEP = {
    "actor/rep_loss": 0.0123456,
    "rep/cosine_similarity": 0.98765,
    "response_length/mean": 5704.25,
    "response_length/clip_ratio": 0.41,
    "perf/tokens_per_second": 123456.0,
    "mem/actor_update_peak_alloc_GB": 62.314,
}


def table(name="name", **changes):
    return TextTable("title", ("what", "time\ns"), [(name, "1.5"), (), ("b", "22.5")], **changes)


def test_a_pipe_gets_plain_lines():
    assert rendered([table(notes=["long " * 20])]) == [
        "title",
        "      time",
        "what     s",
        "----------",
        "name   1.5",
        "",
        "b     22.5",
        "",
        ("long " * 16).rstrip(),
        "  long long long long",
        "",
    ]


def test_only_words_are_folded():
    lines = rendered([table("n" * 100)])
    assert [line.rstrip() for line in lines[4:6]] == ["n" * 74 + "   1.5", "n" * 26]
    narrow = rendered([table("n" * 30)], width=10)  # too narrow for any name
    assert narrow[4:6] == ["n" * 24 + "   1.5", "n" * 6]
    assert rendered([TextTable("", ("", ""), [("a", "b c")], left=(0, 1))])[0] == "a  b c"


def test_closing_tables_of_four_sets_and_two_teachers_fit():
    result = EvalResult(0.53, 0.75, 91.0, 16384.0, 0.999, samples=16)
    sets = dict.fromkeys(("AIME24", "AIME25", "AIMO", "MATH-500"), result)
    models = ["teacher math", "teacher code", "student before", "student after"]
    lines = check_fits(
        closing_tables(dict.fromkeys(models, sets), {"student update": 5.0}, 1.5, "Origin.")
    )
    row = next(line for line in lines if line.startswith("AIMO") and "student after" in line)
    assert row.split() == ["AIMO", "student", "after", "0.5300", "0.7500", "16384.0", "99.9%"]
    assert "student update, delta-peak memory: 1536.0 MiB" in lines
    (alone,) = closing_tables({}, {}, None)
    assert alone.title == "wall-clock"


def test_a_steps_line_has_what_fits():
    assert step_line(STEP, 100) == (
        "loss 0.01235  cos 0.9877  len 5704.2  cut 41%  123456 tok/s  peak 62.31 GiB"
    )
    assert step_line(STEP, 50) == "loss 0.01235  cos 0.9877  len 5704.2  cut 41%"
    assert "aligned 89%" in step_line(STEP | {"align/ratio": 0.891}, 100)
    assert "cut" not in step_line(STEP | {"response_length/clip_ratio": 0.04}, 100)


def test_an_evaluation_of_many_sets_is_a_line_for_each(tmp_path, caplog):
    caplog.set_level(logging.INFO, "oprd")
    result = EvalResult(0.53, 0.75, 91.0, 5704.3, 0.1, samples=16)
    log = RunLog(tmp_path, 3, 1, True)
    log.evaluation(0, "teacher", {"val": result})
    log.evaluation(0, "teacher", dict.fromkeys(("AIME24", "AIME25", "AIMO"), result))
    log.close()
    short, long = caplog.messages
    assert short == "eval at step 0, teacher: val 0.530 (len 5704.3)"
    assert long.splitlines() == [
        "eval at step 0, teacher:",
        *(f"  {name} 0.530 (len 5704.3)" for name in ("AIME24", "AIME25", "AIMO")),
    ]


@pytest.fixture
def console(monkeypatch):
    """A terminal of 80 columns that a run's log writes to."""
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, soft_wrap=True)
    monkeypatch.setattr(run_log, "console", terminal)
    return terminal


def test_the_live_view_says_what_goes_on(tmp_path, console):
    log = RunLog(tmp_path, 100, 1, True)
    log.show()
    try:
        with progress.work("evaluation"), progress.work("teacher on val", 2000, "responses"):
            progress.advance(64)
            progress.detail("token 7")
            assert rendered_view(log) == [
                "evaluation: teacher on val, 64 of 2,000 responses, token 7  0s"
            ]
        log.start()
        log.step(1, STEP)
        bar, numbers, doing = rendered_view(log)
        assert bar.startswith("step 1/100 ")
        assert "eta " in bar
        assert (numbers, doing) == (step_line(STEP), "")
        log.step(2, STEP | {f"actor/{'x' * 40}{i}_loss": 1.0 for i in range(5)})
        assert max(map(len, rendered_view(log))) <= 80
    finally:
        log.close()
    assert console.file.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K\x1b[1A\x1b[2K\x1b[1A\x1b[2K")


def rendered_view(log):
    plain = Console(file=io.StringIO(), width=80, force_terminal=False)
    plain.print(log._view())
    return [line.rstrip() for line in plain.file.getvalue().splitlines()]


def test_a_log_says_now_and_then_what_takes_long(caplog):
    caplog.set_level(logging.INFO, "oprd")
    heartbeat = progress.Heartbeat(first=0.2, every=0.2)
    try:
        with progress.work("loading"):
            progress.expect(3, "files")
            progress.reach(2)
            deadline = time.monotonic() + 20
            while len(caplog.messages) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
        with progress.work("quick"):
            pass
    finally:
        heartbeat.close()
    assert len(caplog.messages) >= 2
    for line in caplog.messages:
        assert re.fullmatch(r"loading, 2 of 3 files \(\d+s so far\)", line), line
    assert progress.describe() == ""
    assert progress.outermost() is None


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")]
)
def test_durations(seconds, shown):
    assert progress.duration(seconds) == shown


def test_a_table_too_wide_for_the_screen_becomes_several():
    heads = ["model", *(f"number\n{i}" for i in range(8))]
    wide = TextTable("title", heads, [("m" * 20, *"12345678"), ()], notes=["note"])
    assert wide.parts(84) == [wide]
    parts = wide.parts(45)
    assert [p.title for p in parts] == ["title", *["title (continued)"] * 2]
    assert [c for p in parts for c in p.heads[1:]] == heads[1:]
    assert [c for p in parts for c in p.rows[0][1:]] == list("12345678")
    assert all(p.rows[0][0] == "m" * 20 for p in parts)
    assert [list(p.notes) for p in parts] == [[], [], ["note"]]
    check_fits(parts, width=45)

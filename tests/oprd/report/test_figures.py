"""What a report makes of comparisons, sweeps and weights, and its statistics."""

import json
import math
import random
import statistics

import numpy as np
import pytest

from oprd.report.chart import binned, spread
from oprd.report.collect import collect
from oprd.report.figures import figures
from oprd.report.intervals import interval, over_seeds, wilson
from oprd.report.results import finals


@pytest.fixture
def comparison(make_run, tmp_path):
    """A directory of oprd-compare: two variants, two rates with the tuning seed, two seeds."""
    variants = {"OPRD": {"oprd": 1.0}, "OPD top-1": {"opd_top1": 1.0}}
    for name, objectives in variants.items():
        slug = name.replace(" ", "_").replace("-", "_")
        for rate, seed, final in (
            (0.001, 100, 0.5), (0.01, 100, 0.6), (0.01, 0, 0.7), (0.01, 1, 0.8),
        ):  # fmt: skip
            config = {"objectives": objectives, "optim": {"lr": rate}}
            make_run(
                f"cmp/{slug}/lr_{rate:g}_seed_{seed}", name=f"{name}, lr {rate:g}, seed {seed}",
                seed=seed, final=final, config=config,
            )  # fmt: skip
    make_run("cmp/OPRD/lr_0.01_seed_0.unfinished_1", name="aside")
    make_run("cmp/teacher", name="teacher")
    directory = tmp_path / "cmp"
    (directory / "teacher").rename(tmp_path / "teacher_run")
    settings = {"variants": {n: {} for n in variants}, "tuning_seed": 100, "report_set": "val"}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "teacher.json").write_text('{"val": 0.97}')
    report = {"variants": {n: {"lr": 0.01} for n in variants}}
    (directory / "compare.json").write_text(json.dumps(report))
    return directory


def drawn(collection):
    charts, missing = figures(collection, finals(collection, {}))
    return {c.key: c for c in charts}, missing


def test_a_comparison_shows_the_seeds_of_the_chosen_rates(comparison):
    collection = collect([comparison])
    assert [(g.label, [r.seed for r in g.runs]) for g in collection.groups] == [
        ("OPRD", [0, 1]), ("OPD top-1", [0, 1]),
    ]  # fmt: skip
    charts, _ = drawn(collection)
    assert [i.value for i in charts["final-val"].items] == pytest.approx([75.0, 75.0])
    assert dict(charts["final-val"].references)["teacher"] == pytest.approx(97.0)
    rates = charts["learning-rate-choice"].lines[0]
    assert (rates.x, rates.y) == ([0.001, 0.01], [50.0, 60.0])


def test_a_comparison_that_goes_on_is_shown_by_rate(comparison):
    (comparison / "compare.json").unlink()
    collection = collect([comparison])
    assert [g.label for g in collection.groups] == ["OPRD, lr 0.01", "OPD top-1, lr 0.01"]
    assert any("is not chosen yet" in note for note in collection.notes)


def test_weights_of_oprd_beside_opd_make_figure_7(make_run):
    runs = []
    for i, (mu, final) in enumerate(((0, 0.4), (1, 0.5), (10, 0.6))):
        objectives = {"opd_top1": 2.0} | ({"oprd": 2.0 * mu} if mu else {})
        runs.append(make_run(f"mu{i}", final=final, config={"objectives": objectives}))
    line = drawn(collect(runs))[0]["mu-sweep"].lines[0]
    assert line.x == [0, 1, 10]
    assert line.y == pytest.approx([40, 50, 60])
    assert any("Figure 7" in text for text in drawn(collect(runs[:1]))[1])


def test_a_sweep_makes_figure_12(make_run, tmp_path):
    (tmp_path / "sweep").mkdir()
    rows = [{"rank": r, "cosine_before": 0.05, "cosine_after": 0.9} for r in (8, 1, 2)]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(rows))
    chart = drawn(collect([tmp_path / "sweep"]))[0]["rank-sweep"]
    assert [line.x for line in chart.lines] == [[1, 2, 8], [1, 2, 8]]
    assert chart.lines[0].y == [0.9] * 3
    (tmp_path / "sweep" / "sweep.json").write_text("[3]")
    collection = collect([tmp_path / "sweep", make_run("demo")])
    assert "holds no ranks" in collection.notes[0]


def test_memory_is_in_mebibytes_and_time_without_evaluation(make_run):
    charts, _ = drawn(collect([make_run("demo", steps=20)]))
    (bubble,) = charts["accuracy-time-memory"].bubbles
    assert (bubble.x, bubble.y, bubble.size) == pytest.approx((15.0, 80.0, 256.0))


def test_bins_hold_mean_smallest_and_largest():
    steps, values = np.arange(1, 1001), np.arange(1000, dtype=float)
    line = binned("x", 0, [(steps, values)], most=10)
    assert line.y == pytest.approx([100 * i + 49.5 for i in range(10)])
    assert (line.low[0], line.high[0], line.low[-1], line.high[-1]) == (0, 99, 900, 999)
    assert line.steps == 1000


def test_gaps_are_left_out_of_lines():
    values = np.array([1.0, np.nan, 3.0])
    line = binned("x", 0, [(np.arange(3), values)])
    assert (line.x, line.y, line.low) == ([0, 2], [1, 3], None)
    assert binned("x", 0, [(np.arange(3), np.full(3, np.nan))]) is None


def test_spread_keeps_first_and_last():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(1000, 4) == [0, 333, 666, 999]


def test_wilson_and_students_intervals_cover_as_often_as_they_say():
    rng = random.Random(0)
    trials, p, n = 2000, 0.3, 40
    covered = 0
    for _ in range(trials):
        low, high = wilson(sum(rng.random() < p for _ in range(n)) / n, n)
        covered += low <= p <= high
    assert 0.93 < covered / trials < 0.97
    covered = 0
    for _ in range(trials):
        low, high = over_seeds([rng.gauss(0.5, 0.05) for _ in range(3)])
        covered += low <= 0.5 <= high
    assert 0.93 < covered / trials < 0.97


def test_an_interval_comes_from_what_is_known():
    result = {"samples": 16, "stderr": 0.05, "problems": 30}
    assert interval([0.5], result, []) == (
        pytest.approx(0.402), pytest.approx(0.598), "30 problems (standard error)",
    )  # fmt: skip
    grades = [0.0, 0.5, 1.0, 0.5]
    low, high, source = interval([0.5], {"samples": 2}, grades)
    half = 1.96 * statistics.stdev(grades) / 2
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert source == "4 problems (standard error)"
    assert interval([1.0], {"samples": 1, "problems": 100}, [])[0] < 1  # not of width 0
    assert interval([1.0], {"samples": 4, "stderr": 0.0, "problems": 60}, [])[0] < 0.95
    assert math.isnan(interval([0.5], {"samples": 1}, [])[0])
    assert math.isnan(interval([0.5, 0.5], {}, [])[0])

"""The report of `oprd-paper`, from results that are made up here."""

import json
import random
import re
import statistics

import pytest

from oprd.paper import measures as m
from oprd.paper.figures import charts
from oprd.paper.measures import Results
from oprd.paper.question import TOO_SMALL, Claim, above
from oprd.paper.questions import SECTIONS
from oprd.paper.report import summary, write_report
from oprd.paper.verdict import (
    NOT_RUN,
    NOT_SAME,
    OURS_ONLY,
    SAME,
    UNDECIDED,
    answers,
    difference,
    spread_of,
)
from oprd.report.png import write_png

SETS = ["three_digits", "four_digits", "five_digits"]
ACCURACY = {
    "opd_top1": 0.5, "opd_top4": 0.55, "opd_full": 0.6, "opd_forward": 0.7,
    "oprd": 0.8,
    "oprd_last": 0.7, "oprd_first_k": 0.75, "oprd_last_k": 0.5, "mu_1": 0.6, "mu_10": 0.65,
    "opd_top1_x4": 0.7, "opd_full_x4": 0.75, "oprd_x4": 0.85, "bridge_r1": 0.4, "bridge_r8": 0.5,
    "bridge_r32": 0.45, "shape_top1": 0.6, "shape_top4": 0.45, "bridge_then_top1": 0.55,
    "tok_bridge": 0.4, "tok_student_ids": 0.3,
    "opd_jsd": 0.65,
}  # fmt: skip
PROBLEMS = 20


def result(avg):
    return {
        "avg": avg, "best": min(1.0, avg + 0.1), "dist_4g": 20.0, "length": 60.0, "truncated": 0.0,
        "samples": 2, "problems": PROBLEMS, "stderr": 0.1,
    }  # fmt: skip


def measurement(avg):
    return {
        "tokens": 5000, "length": 60.0, "cosine": 0.8 + avg / 10, "cosine_last_layer": 0.9,
        "cosine_first_k": [[1, 0.99], [16, 0.97], [128, 0.9]],
        "cosine_last_k": [[1, 0.7], [16, 0.8 + avg / 100], [128, 0.9]],
        "kl": 0.3 - avg / 5, "overlap": 0.8, "entropy": 0.3, "teacher_entropy": 0.2,
        "token_variance": {"top1": 0.4 - avg / 10, "mean_square": 0.1, "oprd": 0.0},
        "snr": {"opd_top1": 0.1, "opd_full": 0.5, "oprd": 2.0 + avg},
    }  # fmt: skip


def run(name, seed, rng, seconds=80.0):
    """A run that gains evenly up to its accuracy, give or take, with grades of that mean."""
    avg = ACCURACY[name] + rng.gauss(0, 0.01)
    grades = {}
    for which in SETS:
        right = round(avg * 2 * PROBLEMS)
        grades[which] = [((i < right) + (i + PROBLEMS < right)) / 2 for i in range(PROBLEMS)]
    values = {which: result(statistics.fmean(grades[which])) for which in SETS}
    logged = ("response_length/mean", "rep/cosine_similarity", "actor/pg_loss", "actor/entropy")
    return {
        "seed": seed, "directory": f"rows/{name}/seed_{seed}",
        "results": values | {"val": result(avg)},
        "curve": [[s, seconds * s / 40, 0.25 + (avg - 0.25) * s / 40] for s in range(0, 41, 10)],
        "logged": {key: [[s, 0.5 + avg / s] for s in range(1, 41)] for key in logged},
        "grades": grades,
        "seconds": {"rollout": seconds / 2, "teacher": seconds / 8, "student update": seconds / 8},
        "tokens_per_second": 900.0, "measured": measurement(avg),
    }  # fmt: skip


@pytest.fixture
def results():
    """Results of a default run: all rows with three seeds."""
    rng = random.Random(0)
    rows = [
        {
            "id": name, "name": name, "teacher": "teacher", "lr": 1e-3, "steps": 40,
            "rollouts": 128 if name.endswith("x4") else 32,
            "runs": [run(name, seed, rng, 60.0 if name == "oprd" else 80.0) for seed in range(3)],
        }
        for name in ACCURACY
    ]  # fmt: skip
    models = {
        name: {which: result(avg) for which in [*SETS, "val"]}
        for name, avg in (
            ("student", 0.25), ("teacher", 0.95), ("teacher_of_other_shape", 0.9),
            ("teacher_of_other_tokenizer", 0.9),
        )
    }  # fmt: skip
    return {
        "level": "default", "machine": "2 cores", "seconds": 5000.0, "jobs": 2, "threads": 1,
        "steps": 40, "rollouts": 32, "samples": 2, "problems": PROBLEMS, "val_every": 10,
        "vocabulary": 28, "sets": SETS, "models": models, "start": measurement(0.25), "rows": rows,
    }  # fmt: skip


@pytest.fixture
def no_pngs(monkeypatch):
    """Charts are drawn on the page alone, since PNGs take long."""
    monkeypatch.setattr("oprd.paper.report.write_png", lambda chart, file: None)


def only_seed(results, seed):
    for row in results["rows"]:
        row["runs"] = [r for r in row["runs"] if r["seed"] == seed]
    return results


def without(results, *names):
    results["rows"] = [row for row in results["rows"] if row["id"] not in names]
    return results


def by_key(results):
    return {a.key: a for a in answers(Results(results))}


def test_the_papers_order_is_found_and_its_reverse_is_too(results):
    found = by_key(results)
    assert found["equal-steps"].verdict == SAME
    assert found["mu"].verdict == SAME
    assert found["equal-steps"].differences[0].mean == pytest.approx(30, abs=3)
    rows = {row["id"]: row for row in results["rows"]}
    rows["oprd"]["runs"], rows["opd_top1"]["runs"] = rows["opd_top1"]["runs"], rows["oprd"]["runs"]
    assert by_key(results)["equal-steps"].verdict == NOT_SAME


def test_an_interval_that_holds_zero_decides_nothing(results):
    for row in results["rows"]:
        for r, avg in zip(row["runs"], (0.3, 0.6, 0.5), strict=True):
            r["results"] |= {which: result(avg) for which in SETS}
    oprd = next(row for row in results["rows"] if row["id"] == "oprd")
    for r, avg in zip(oprd["runs"], (0.4, 0.5, 0.52), strict=True):
        r["results"] |= {which: result(avg) for which in SETS}
    answer = by_key(results)["equal-steps"]
    assert answer.verdict == UNDECIDED
    low, high = answer.differences[0].low, answer.differences[0].high
    # differences of 10, -10 and 2 points: Student's t of 2 degrees of freedom is 4.303
    assert (low, high) == pytest.approx((0.667 - 25.01, 0.667 + 25.01), abs=0.05)
    assert "-24.3 to 25.7" in answer.differences[0].text()


def test_one_seed_is_compared_over_its_problems(results):
    read = Results(only_seed(results, 1))
    found = difference(read, above("oprd", "opd_top1", m.ACCURACY))
    assert found.over == "60 problems, paired; one seed"
    assert found.sign == 1
    unpaired = difference(read, above("oprd", m.STUDENT, m.ACCURACY))
    assert unpaired.over == "one seed: problems, not paired"
    # each accuracy is a mean of three sets with a standard error of 10 points each
    assert unpaired.high - unpaired.mean == pytest.approx(1.96 * 10 * (2 / 3) ** 0.5)
    assert by_key(results)["shorter"].verdict == UNDECIDED
    assert "one seed: no interval" in by_key(results)["shorter"].differences[0].text()


def test_equal_seconds_are_those_of_the_first_run_to_end(results):
    read = Results(results)
    found = difference(read, above("oprd", "opd_top1", m.EQUAL_SECONDS))
    # OPRD ends after 60 s, when OPD is at 3/4 of its 80 s
    ends = [
        [100 * r["results"]["val"]["avg"] for r in read.runs(name).values()]
        for name in ("oprd", "opd_top1")
    ]
    wanted = statistics.fmean(a - (25 + 0.75 * (b - 25)) for a, b in zip(*ends, strict=True))
    assert found.mean == pytest.approx(wanted)


def test_rollouts_needed_are_interpolated_and_bounded(results):
    read = Results(results)
    (runs, slow) = (read.runs(name)[0] for name in ("oprd", "opd_top1"))
    gain = runs["results"]["val"]["avg"] - 0.25
    assert m.rollouts_to(runs, 0.5) == pytest.approx(0.35 / gain * 40 * 32)
    assert m.rollouts_to(slow, 0.5) is None
    found = difference(read, above("opd_top1", "oprd", m.rollouts(0.5)))
    assert found.sign == 1
    assert "or more" in found.text()
    assert difference(read, above("oprd", "opd_top1", m.rollouts(0.5))).sign == -1
    both = difference(read, above("opd_top1", "shape_top4", m.rollouts(0.5)))
    assert both.mean is None


def test_four_times_the_rollouts_is_a_difference_of_gains(results):
    first = by_key(results)["batch-gain"].differences[0]
    assert first.mean == pytest.approx((70 - 50) - (85 - 80), abs=4)
    assert first.label == "gain of OPD top-1 minus gain of OPRD"


def test_what_was_not_run_is_said(results):
    found = by_key(without(results, "opd_top4", "mu_1", "shape_top1", "tok_bridge"))
    assert found["equal-steps"].verdict == UNDECIDED  # a part of the answer is not the answer
    assert "OPD top-4" in found["equal-steps"].note
    assert found["mu"].verdict == UNDECIDED
    assert found["bridge-length"].verdict == NOT_RUN
    assert found["student-ids"].verdict == NOT_RUN
    assert "28 tokens" in found["memory"].note
    assert found["forward"].verdict == OURS_ONLY


def test_every_row_of_the_recipe_is_shown_and_every_claim_is_about_rows_of_it(results):
    from oprd.paper.recipe import recipe

    shown = {name for s in SECTIONS for name in s.rows if name not in m.MODELS}
    assert shown == set(recipe().rows)
    claims = [c for s in SECTIONS for q in s.questions for c in q.claims]
    assert {name for c in claims for name, _ in c.terms} - {*m.MODELS} <= shown
    assert len({q.key for s in SECTIONS for q in s.questions} | {s.key for s in SECTIONS}) > 40


def test_a_report_of_everything_stands_alone(results, tmp_path, no_pngs):
    found = write_report(results, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    for section in SECTIONS:
        assert f'id="{section.key}"' in page
    anchors = re.findall(r' id="([^"]+)"', page.split("<script type")[0])
    assert len(set(anchors)) == len(anchors)
    assert all(f'id="{name}"' in page for name in re.findall(r'href="#([^"]+)"', page))
    assert "AIME24, %" in page
    assert "http://" not in page.split("<script")[0]
    verdicts = json.loads((tmp_path / "report" / "verdicts.json").read_text())
    assert [v["verdict"] for v in verdicts] == [a.verdict for a in found]
    text = (tmp_path / "report" / "summary.md").read_text()
    assert summary(found) in text
    assert "| opd_top1 | 42.3 | 33.5 | 77.0 | 50.9 |" in text


@pytest.mark.parametrize("cut", ["rows", "measured", "models", "one seed each"])
def test_a_report_is_written_of_what_there_is(results, tmp_path, no_pngs, cut):
    if cut == "rows":
        results["rows"] = []
    if cut == "models":
        results["models"] = {}
    if cut == "measured":
        results["start"] = None
    for i, row in enumerate(results["rows"]):
        if cut == "one seed each":
            row["runs"] = row["runs"][i % 3 :][:1]
        for r in row["runs"]:
            if cut == "measured":
                r |= {"measured": None, "logged": {}, "grades": {}, "curve": []}
    found = write_report(results, tmp_path)
    assert (tmp_path / "index.html").stat().st_size > 1000
    if cut == "rows":
        answered = {a.key for a in found if a.verdict not in (NOT_RUN, TOO_SMALL)}
        assert answered == {"variance"}  # of the student before training


def test_charts_have_the_numbers(results, tmp_path):
    drawn = {c.key: c for c in charts(Results(results))}
    assert drawn["accuracy-by-mu"].lines[0].x == [0, 1, 10]
    assert [line.label for line in drawn["cosine-by-k"].lines][:2] == [
        "oprd, first k",
        "oprd, last k",
    ]
    by_rollout = {line.label: line.x[-1] for line in drawn["batch-by-rollout"].lines[:-1]}
    assert by_rollout["oprd_x4"] == 4 * by_rollout["oprd"] == 40 * 128
    seconds = {line.label: line.x[-1] for line in drawn["figure-4-by-second"].lines}
    assert seconds["oprd"] == pytest.approx(60)
    write_png(drawn["accuracy-and-time"], tmp_path / "bubbles.png")
    assert (tmp_path / "bubbles.png").stat().st_size > 5000


def test_a_variance_of_oprd_contradicts_the_theory(results):
    assert by_key(results)["variance"].verdict == SAME
    results["start"]["token_variance"]["oprd"] = 1e-9
    assert by_key(results)["variance"].verdict == NOT_SAME


def test_an_exact_claim_must_hold_in_every_run(results):
    claim = Claim((("oprd", 1.0),), m.TOP1_VARIANCE, "variance", exact=True)
    assert difference(Results(results), claim).sign == 1
    results["rows"][4]["runs"][0]["measured"]["token_variance"]["top1"] = 0.0
    assert difference(Results(results), claim).sign == 0


def test_a_mean_has_an_interval_over_seeds_or_over_problems(results):
    values = [m.ACCURACY.value(r) for r in Results(results).runs("oprd").values()]
    mean, half = spread_of(Results(results), m.ACCURACY, "oprd")
    assert mean == pytest.approx(statistics.fmean(values))
    assert half == pytest.approx(4.303 * statistics.stdev(values) / 3**0.5, rel=1e-3)
    _, alone = spread_of(Results(only_seed(results, 0)), m.ACCURACY, "oprd")
    assert alone == pytest.approx(1.96 * 10 / 3**0.5)

"""What `oprd-report` makes of directories that ``oprd-eval`` wrote."""

import json
import random
import re

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from oprd.cli.report import main
from oprd.evaluation.evaluate import Sample
from oprd.evaluation.report import by_problem, comparisons, set_results
from oprd.evaluation.store import RESULTS, Store
from oprd.report import problems
from oprd.report.boards import boards, differences
from oprd.report.build import ReportConfig, report, write_report
from oprd.report.collect import collect
from oprd.report.evals import read_eval
from tests.oprd.report.test_report import figures_of, fingerprint, mutated, page_of, written

assert written  # the fixture

GRADES = {"base": ["0000", "1111", "0011", "0000"], "after": ["1100", "1111", "0111", "000x"]}


def make_eval(directory, grades=GRADES, name="val", say="so {n}", **sampling):
    """Writes what ``oprd-eval`` writes, with these grades by model, problem and sample."""
    n = len(next(iter(grades.values()))[0])
    store, found = Store(directory), {}
    settings = {
        "version": "0.1.0",
        "sampling": {"samples": n, "temperature": 0.7, "top_p": 0.95} | sampling,
        "sets": {name: {"path": f"{name}.jsonl", "suffix": "Box it.", "grader": "math"}},
        "models": {},
    }
    for label, by in grades.items():
        samples = {}
        for problem, verdicts in enumerate(by):
            for i, v in enumerate(verdicts):
                score = None if v == "?" else float(v == "1")
                samples[name, problem, i] = Sample(
                    problem, i, f"<|im_start|>user\nWhat is {problem} + 1?", say.format(n=i),
                    None if v == "?" else str(problem + 1), 10 + i, v == "0", score,
                    None if v == "?" else True, "time limit" if v == "x" else None,
                )  # fmt: skip
        store.finish(label, samples, [name])
        found[label] = {name: by_problem(samples, name)}
        of_set = {"prompts": "0123", "problems": len(by), "max_new_tokens": 100}
        settings["models"][label] = {"path": f"./{label}", "step": None, "sets": {name: of_set}}
    graded = "?" not in str(grades)
    results = {k: settings[k] for k in ("version", "sampling")} | {
        "teacher": None,
        "models": {m: {"sets": {name: set_results(p[name])}} for m, p in found.items()},
        "comparisons": comparisons(found) if graded else [],
    }
    (directory / "settings.json").write_text(json.dumps(settings))
    (directory / RESULTS).write_text(json.dumps(results))
    return results


def json_of(page, kind):
    """The data of the lists of problems on a page."""
    found = re.findall(rf'<script type="application/json" class="{kind}"[^>]*>(.*?)</script>', page)
    return [json.loads(text) for text in found]


def cells_of(page, title):
    """The texts of the table under a title."""
    table = re.search(rf">{re.escape(title)}</h3>.*?</table>", page, re.S)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_an_evaluation_alone(tmp_path, capsys):
    results = make_eval(tmp_path / "eval")
    before = fingerprint(tmp_path / "eval")
    out = tmp_path / "out"
    main([str(tmp_path / "eval"), "--output_dir", str(out)])
    assert fingerprint(tmp_path / "eval") == before
    assert "1 evaluation(s)" in capsys.readouterr().out
    page = page_of(out)
    assert "<title>Report: base, after</title>" in page
    assert "No run yet" not in page
    assert "Not recorded" not in page
    assert set(figures_of(page)) == {"eval-val", "eval-difference-after"}
    assert {f.stem for f in out.glob("*.png")} == {"eval-val", "eval-difference-after"}
    accuracy = figures_of(page)["eval-val"]["data"]
    assert [t["x"] for t in accuracy] == [[37.5], [56.25]]
    (found,) = results["comparisons"]
    (trace,) = figures_of(page)["eval-difference-after"]["data"]
    assert trace["x"] == [pytest.approx(100 * found["mean"])] == [18.75]
    half = 100 * (found["high"] - found["mean"])
    assert trace["error_x"]["array"] == [pytest.approx(half, abs=1e-3)]
    rows = cells_of(page, "after against base, problem by problem")
    low, high = (f"{100 * found[end]:+.1f}" for end in ("low", "high"))
    assert rows[1] == ["val", "+18.8", f"{low} to {high}", "2", "0", "4"]
    models = cells_of(page, "val")
    assert [row[:2] for row in models[1:]] == [["base", "37.5"], ["after", "56.2"]]
    assert models[2][6] == "1"  # no verdict
    settings = {row[0]: row[1:] for row in cells_of(page, "Settings")}
    assert settings["path"] == ["./base", "./after"]
    assert settings["temperature"] == ["0.7"]
    assert settings["val: suffix"] == ["Box it."]
    assert settings["val: max_new_tokens"] == ["100"]


def test_problem_by_problem(tmp_path, written):
    make_eval(tmp_path / "eval")
    page = written(tmp_path / "eval")
    (data,) = json_of(page, "rows")
    assert data["models"] == ["base", "after"]
    assert [row[0] for row in data["rows"]] == [0, 1, 2, 3]
    assert [row[3] for row in data["rows"]] == [list(p) for p in zip(*GRADES.values(), strict=True)]
    assert [row[1:3] for row in data["rows"]][:2] == [["1", "0 + 1?"], ["2", "1 + 1?"]]
    solved = cells_of(page.replace("<caption", "<!--").replace("</caption>", "-->"), "val")
    assert solved  # results
    counts = re.search(r"base, after</th>(.*?)</tr>", page)[1]
    assert re.findall(r">(\d+)<", counts) == ["2", "0", "1", "1"]
    (texts,) = json_of(page, "texts")
    prompt, by_model = texts["0"]
    assert prompt == "<|im_start|>user\nWhat is 0 + 1?"
    assert by_model["1"] == {str(i): [f"so {i}", 10 + i, i > 1] for i in range(4)}


def test_html_in_a_response_stays_text(tmp_path, written):
    nasty = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)>"
    make_eval(tmp_path / "eval", {nasty: ["01"], "b": ["11"]}, name=nasty, say=nasty)
    page = written(tmp_path / "eval")
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<!-- <" not in page
    assert json_of(page, "texts")[0]["0"][1]["0"]["0"][0] == nasty


def test_beside_a_run_and_inside_one(tmp_path, written, make_run):
    run = make_run("run")
    make_eval(run / "eval")
    before = fingerprint(run)
    page = written(run)
    assert fingerprint(run) == before
    assert {"final-val", "eval-val", "accuracy-val-step"} <= set(figures_of(page))
    assert "Responses before and after" not in page  # the evaluation's samples are not the run's
    groups = {t["meta"] for f in figures_of(page).values() for t in f["data"] if "meta" in t}
    assert groups - {-1} == {0, 1, 2}
    with pytest.raises(Exception, match="which a report does not write to"):
        report(ReportConfig([run], run / "eval" / "report"))


def test_models_of_two_evaluations_are_compared_on_the_same_problems(tmp_path, written):
    for label, by in GRADES.items():
        make_eval(tmp_path / label, {"x": by})
    make_eval(tmp_path / "less", {"few": ["10"] * 4})  # as many problems, fewer samples
    make_eval(tmp_path / "other", {"one": ["1111"]})
    page = written(tmp_path)  # a directory of evaluations
    boards = {tuple(d["models"]): d for d in json_of(page, "rows")}
    assert set(boards) == {("x (after)", "x (base)"), ("few",), ("one",)}
    assert "x (base) against x (after), problem by problem" in page
    titles = re.findall(r'<h3 id="board-\d-title">(.*?)</h3>', page)
    assert titles == ["val (after)", "val (less)", "val (other)"]


def test_two_sets_and_their_mean_are_what_oprd_eval_says(tmp_path):
    results = [make_eval(tmp_path / "a")]
    other = {"base": ["01", "00", "10"], "after": ["11", "01", "00"]}
    results.append(make_eval(tmp_path / "b", other, name="b"))
    found = differences(boards([read_eval(tmp_path / name) for name in "ab"]))
    assert list(found) == [("base", "after")]
    *of_sets, mean = found["base", "after"]
    assert of_sets == [r["comparisons"][0] for r in results]
    assert (mean["set"], mean["problems"]) == ("mean of sets", 7)
    assert mean["mean"] == pytest.approx(sum(d["mean"] for d in of_sets) / 2)


def test_a_set_without_answers_has_responses_and_no_grades(tmp_path, written):
    make_eval(tmp_path / "eval", {"a": ["??", "??"], "b": ["??", "??"]})
    page = written(tmp_path / "eval")
    (data,) = json_of(page, "rows")
    assert not data["graded"]
    assert figures_of(page) == {}
    assert 'class="filter-by"' not in page
    assert json_of(page, "texts")[0]["1"][1]["1"]["0"] == ["so 0", 10, False]


@pytest.mark.slow
def test_a_large_evaluation_makes_a_small_page(tmp_path, written, monkeypatch):
    monkeypatch.setattr(problems.views, "__defaults__", (400_000,))
    rng = random.Random(0)
    grades = {
        m: ["".join(rng.choice("01") for _ in range(4)) for _ in range(1000)] for m in ("a", "b")
    }
    make_eval(tmp_path / "eval", grades, say="word " * 2000 + "{n}")
    page = written(tmp_path / "eval")
    (data,) = json_of(page, "rows")
    assert len(data["rows"]) == 1000
    assert len(page) < 700_000
    texts = {int(row): t for chunk in json_of(page, "texts") for row, t in chunk.items()}
    assert 40 <= len(texts) < 60
    shares = [[v.count("1") for v in row[3]] for row in data["rows"]]
    gaps = [abs(x - y) for x, y in shares]
    others = set(range(1000)) - texts.keys()
    assert min(gaps[row] for row in texts) >= max(gaps[row] for row in others)
    text = texts[min(texts)][1]["0"]
    assert all("6,001 characters are left out" in t and t[-1].isdigit() for t, *_ in text.values())


BAD = {
    "being sampled": (lambda d: (d / "results.json").unlink(), None),
    "results cut": (lambda d: (d / "results.json").write_text('{"models": {"ba'), "results.json"),
    "settings cut": (lambda d: (d / "settings.json").write_text("{"), "settings.json could not"),
    "samples cut": (
        lambda d: (d / "base" / "samples.jsonl").write_bytes(
            (d / "base" / "samples.jsonl").read_bytes()[:-30]
        ),
        "base: samples.jsonl: its last line, 16, is cut",
    ),
    "no samples": (lambda d: (d / "base" / "samples.jsonl").unlink(), None),
    "samples of another version": (
        lambda d: (d / "base" / "samples.jsonl").write_text('{"model": "base", "x": 1}\n[]\n'),
        "1 records without set, problem or response",
    ),
    "nothing yet": (
        lambda d: [(d / n).unlink() for n in
                   ("results.json", "base/samples.jsonl", "after/samples.jsonl")],
        "base has no results yet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_can_not_be_read_is_a_gap(kind, tmp_path, written):
    make_eval(tmp_path / "eval")
    make_eval(tmp_path / "good", {"good": ["01"]}, name="g")
    spoil, message = BAD[kind]
    spoil(tmp_path / "eval")
    page = written(tmp_path)
    assert message is None or message in page
    assert "eval-g" in figures_of(page)
    if kind == "being sampled":  # the samples tell as much
        assert [t["x"] for t in figures_of(page)["eval-val"]["data"]] == [[37.5], [56.25]]
    if kind == "no samples":
        assert [t["x"] for t in figures_of(page)["eval-val"]["data"]] == [[37.5], [56.25]]


@pytest.mark.parametrize("seed", range(6))
def test_nasty_values_never_end_in_a_traceback(seed, tmp_path, written):
    rng = random.Random(seed)
    make_eval(tmp_path / "eval")
    for name in ("settings.json", "results.json"):
        values = json.loads((tmp_path / "eval" / name).read_text())
        (tmp_path / "eval" / name).write_text(json.dumps(mutated(values, rng)))
    file = tmp_path / "eval" / "base" / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [mutated(line, rng) if rng.random() < 0.5 else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "after" in written(tmp_path / "eval")


def test_an_evaluation_that_goes_on_is_followed(tmp_path):
    make_eval(tmp_path / "eval")
    assert collect([tmp_path / "eval"]).ended
    parts = tmp_path / "eval" / "late" / "parts"
    parts.mkdir(parents=True)
    (parts / "0000_rank_0.jsonl").write_text("")
    assert not write_report(
        ReportConfig([tmp_path / "eval"], tmp_path / "out", watch=5), pictures=False
    ).ended

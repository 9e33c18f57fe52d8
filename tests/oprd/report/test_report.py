"""`oprd-report` as its user sees it: the page, the pictures, and what it makes of bad input."""

import hashlib
import json
import random
import re

import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from oprd.cli.report import main
from oprd.errors import ConfigError
from oprd.report import build
from oprd.report.build import ReportConfig, report, write_report
from oprd.report.page import get_plotlyjs
from tests.oprd.report.conftest import evaluation, step_record


def page_of(out):
    """The page without plotly's script."""
    return (out / "index.html").read_text().replace(get_plotlyjs(), "")


def figures_of(page):
    text = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)[1]
    return json.loads(text)["figures"]


@pytest.fixture
def written(tmp_path):
    """Writes a page without pictures and returns its text."""

    def write(*runs, **options):
        out = tmp_path / "out"
        write_report(ReportConfig(runs, out, watch=5, **options), pictures=False)
        return page_of(out)

    return write


def fingerprint(directory):
    files = sorted(f for f in directory.rglob("*") if f.is_file())
    return [(f, f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).digest()) for f in files]


def test_a_page_and_pictures_and_nothing_of_the_run_is_written_to(make_run, tmp_path, capsys):
    run = make_run("demo")
    before = fingerprint(run)
    main([str(run), "--output_dir", str(tmp_path / "out")])
    assert fingerprint(run) == before
    page = page_of(tmp_path / "out")
    drawn = set(figures_of(page))
    assert {"accuracy-val-step", "accuracy-val-seconds", "accuracy-time-memory"} <= drawn
    assert {"rep-cosine-similarity", "layer-cosine-1", "response-length-mean"} <= drawn
    assert {f.stem for f in (tmp_path / "out").glob("*.png")} == drawn
    for key in drawn:  # a picture, a name, words and a table for each
        assert f'id="{key}" role="img" aria-label="' in page
        assert f'href="{key}.png"' in page
        assert f'id="{key}-numbers"' in page
    assert "index.html" in capsys.readouterr().out


def test_the_page_loads_nothing(written, make_run):
    page = written(make_run("demo"))
    assert "default-src 'none'" in page
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)([^"']*)""", page)
    assert outside == []


def test_axes_have_names_and_units(written, make_run):
    for key, figure in figures_of(written(make_run("demo"))).items():
        assert figure["layout"]["xaxis"]["title"]["text"], key
    page = written(make_run("other"))
    assert figures_of(page)["time-by-phase"]["layout"]["xaxis"]["title"]["text"] == "time (s)"


def test_text_of_a_response_is_text(written, make_run):
    nasty = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
    run = make_run("demo", name=nasty)
    samples = run / "samples"
    samples.mkdir()
    for step, model, score in ((0, "student before", 0.0), (20, "student after", 1.0)):
        sample = {
            "step": step, "model": model, "set": nasty, "prompt": nasty, "answer": nasty,
            "response": nasty, "score": score,
        }  # fmt: skip
        file = samples / f"samples_{step:08d}_{model.replace(' ', '_')}_val.jsonl"
        file.write_text(json.dumps(sample) + "\n")
    page = written(run)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert "&amp;amp;" in page
    names = {t.get("name") for f in figures_of(page).values() for t in f["data"]} - {None}
    assert not any("<" in name for name in names)  # plotly reads some tags in names


def test_responses_before_and_after_with_their_grades(written, make_run):
    run = make_run("demo")
    grades = {"student before": [0, 1, 1, 0], "student after": [1, 0, 1, 0]}
    (run / "samples").mkdir()
    for step, (model, scores) in zip((0, 20), grades.items(), strict=True):
        lines = [
            {"step": step, "model": model, "set": "val", "prompt": f"question {i}", "answer": "7",
             "response": f"{model} says {i}", "score": float(score)}
            for i, score in enumerate(scores)
        ]  # fmt: skip
        file = run / "samples" / f"samples_{step:08d}_{model.replace(' ', '_')}_val.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = written(run)
    assert "1 better, 1 worse, 1 still right, 1 still wrong" in page
    articles = dict(re.findall(r"<article.*?question (\d).*?</pre>(.*?)</article>", page, re.S))
    verdicts = {i: re.findall(r"[\u2713\u2717] (right|wrong)", a) for i, a in articles.items()}
    assert verdicts == {
        "0": ["wrong", "right"], "1": ["right", "wrong"], "2": ["right", "right"],
        "3": ["wrong", "wrong"],
    }  # fmt: skip
    assert "student before says 0" in articles["0"]
    assert "student after says 0" in articles["0"]


def test_seeds_are_one_line_with_a_band_and_an_interval(written, make_run):
    runs = [make_run(f"s{seed}", name="x", seed=seed, final=0.7 + 0.1 * seed) for seed in (0, 1)]
    page = written(*runs)
    traces = figures_of(page)["rep-cosine-similarity"]["data"]
    assert [t.get("name") for t in traces if t.get("fill") is None] == ["x"]
    final = figures_of(page)["final-val"]["data"]
    assert [t["x"] for t in final] == [[75.0]]
    assert "2 seeds (Student&#39;s t)" in page


def test_two_runs_of_the_same_name_are_told_apart(written, make_run):
    runs = [make_run(f"{w}/demo", name="demo", config={"optim": {"lr": w}}) for w in ("a", "b")]
    page = written(*runs)
    names = [t["name"] for t in figures_of(page)["actor-lr"]["data"]]
    assert names == ["demo (a/demo)", "demo (b/demo)"]
    row = re.search(r"<code>optim.lr</code></th>(.*?)</tr>", page)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["a", "b"]
    assert "<code>seed</code>" not in page


def test_identical_runs_are_not_joined(written, make_run):
    page = written(make_run("a", name="x"), make_run("b", name="x"))
    assert [t["name"] for t in figures_of(page)["actor-lr"]["data"]] == ["x (a)", "x (b)"]


def test_a_run_named_twice_is_shown_once(written, make_run):
    run = make_run("demo")
    page = written(run, run)
    assert len(figures_of(page)["actor-lr"]["data"]) == 1
    assert "named twice are shown once" in page


BAD = {
    "cut in the middle of a line": (
        lambda run: (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-40]),
        "its last line, 26, is cut",
    ),
    "damaged inside": (
        lambda run: (run / "metrics.jsonl").write_text(
            (run / "metrics.jsonl").read_text().replace('{"step": 3,', "\x00{", 1)
        ),
        "1 of 26 lines could not be read, the first is line 5",
    ),
    "no objects": (
        lambda run: (run / "metrics.jsonl").write_text("[1]\n3\nnull\n" * 3),
        "9 of 9 lines could not be read",
    ),
    "bytes that are no text": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00" * 50 + b"\n"),
        "1 of 1 lines could not be read",
    ),
    "deeply nested": (
        lambda run: (run / "metrics.jsonl").write_text("[" * 100_000 + "\n"),
        "could not be read",
    ),
    "no steps": (
        lambda run: (run / "metrics.jsonl").write_text('{"loss": 1}\n{"step": "x", "a": 2}\n'),
        "2 lines have no whole number as step",
    ),
    "other types": (
        lambda run: (run / "metrics.jsonl").write_text(
            '{"step": 1, "actor/lr": "fast", "rep/layer_cosine": 3, "actor/grad_norm": [1, "x"]}\n'
            '{"step": 2, "actor/lr": NaN, "rep/layer_cosine": ["a", null], "x": {"y": 1}}\n'
        ),
        "values that are no numbers are left out: actor/lr, x",
    ),
    "settings of another version": (
        lambda run: (run / "config.yaml").write_text("a: [unclosed\n"),
        "config.yaml could not be read",
    ),
    "settings that are a list": (
        lambda run: (run / "config.yaml").write_text("- a\n- b\n"),
        "config.yaml holds no mapping",
    ),
    "a summary of another version": (
        lambda run: (run / "summary.json").write_text(
            '{"evaluations": {"student after": {"val": 3}, "teacher": [1]}, "seconds": "long"}'
        ),
        "summary.json holds",
    ),
    "a summary cut short": (
        lambda run: (run / "summary.json").write_text('{"steps": 20, "eval'),
        "summary.json could not be read",
    ),
    "steps again after a restart": (
        lambda run: (
            (run / "metrics.jsonl").open("a").write(json.dumps(step_record(7, 20, 0, 4)) + "\n")
        ),
        "steps were repeated 1 times",
    ),
    "an empty metrics file": (
        lambda run: (
            [(run / n).unlink() for n in ("summary.json", "config.yaml")]
            and (run / "metrics.jsonl").write_text("")
        ),
        "the run is empty",
    ),
    "no metrics file": (
        lambda run: [(run / n).unlink() for n in ("summary.json", "metrics.jsonl")],
        "there is no metrics.jsonl",
    ),
}


@pytest.mark.parametrize("kind", [k for k in BAD if "a summary of" not in k])
def test_what_cannot_be_read_is_a_message_and_a_gap(kind, written, make_run):
    good, bad = make_run("good"), make_run("bad")
    spoil, message = BAD[kind]
    spoil(bad)
    page = written(good, bad)
    assert message in page
    assert "good" in [t["name"] for t in figures_of(page)["actor-lr"]["data"]]


def test_a_summary_of_another_version_leaves_the_metrics(written, make_run):
    run = make_run("demo")
    BAD["a summary of another version"][0](run)
    page = written(run)
    assert figures_of(page)["final-val"]["data"][0]["x"] == [80.0]  # of the metrics' last line
    assert figures_of(page)["time-by-phase"]["data"][0]["x"] == [10.0]


def test_steps_after_a_restart_replace_the_earlier_ones(written, make_run):
    run = make_run("demo")
    BAD["steps again after a restart"][0](run)
    line = figures_of(written(run))["actor-lr"]["data"][0]
    assert line["x"] == list(range(1, 8))


def test_only_empty_runs_make_a_page_without_charts(written, make_run):
    run = make_run("bad")
    BAD["an empty metrics file"][0](run)
    page = written(run)
    assert figures_of(page) == {}
    assert "Figure 6, cosine similarity: no run records rep/cosine_similarity" in page


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda tmp: tmp / "nothing", "does not exist"),
        (lambda tmp: (tmp / "x.txt", (tmp / "x.txt").write_text("x"))[0], "is a file"),
        (lambda tmp: (tmp / "e", (tmp / "e").mkdir())[0], "holds no run yet"),
    ],
)
def test_paths_that_hold_no_run_end_with_a_message(prepare, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(prepare(tmp_path)), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_is_not_written_into_a_run(make_run):
    run = make_run("demo")
    before = fingerprint(run)
    for out in (run, run / "report"):
        with pytest.raises(ConfigError, match="which a report does not write to"):
            report(ReportConfig([run], out))
    assert fingerprint(run) == before


def test_another_page_is_not_overwritten(make_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("<h1>my site</h1>")
    with pytest.raises(ConfigError, match="would be lost"):
        report(ReportConfig([make_run("demo")], tmp_path / "out"))


def test_an_unknown_set_is_refused(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"'aime', only on \['val'\]"):
        report(ReportConfig([make_run("demo")], tmp_path / "out", set_name="aime"))


def test_a_missing_package_is_named(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plotly.*pip install 'oprd\[report\]'"):
        report(ReportConfig([make_run("demo")], tmp_path / "out"))


def test_ten_thousand_steps_fit_in_a_small_page(written, make_run):
    page = written(make_run("long", steps=10_000, layers=16))
    line = figures_of(page)["response-length-mean"]["data"][-1]
    assert len(line["x"]) == 400
    assert "10,000 recorded steps are shown as 400 means" in page
    assert len(figures_of(page)["layer-cosine-1"]["data"][0]["x"]) == 200
    assert len(page) < 1_000_000  # plotly's own script apart


def test_watch_follows_a_run_until_it_ends(make_run, tmp_path, monkeypatch):
    run, out = make_run("live", finished=False), tmp_path / "out"
    done = make_run("done")
    pages = []

    def sleep(seconds):
        assert seconds == 2
        pages.append(page_of(out))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_record(21, 21, 0, 4)) + "\n")
            file.write(json.dumps(evaluation(21, "student after", 0.8)) + "\n")
        if len(pages) == 2:
            (run / "summary.json").write_bytes((done / "summary.json").read_bytes())

    monkeypatch.setattr(build.time, "sleep", sleep)
    monkeypatch.setattr(build, "write_png", lambda chart, file: file.write_bytes(b""))
    report(ReportConfig([run], out, watch=2))
    assert 'data-seconds="2"' in pages[0]
    assert [max(figures_of(p)["actor-lr"]["data"][0]["x"]) for p in pages] == [20, 21]
    assert "data-seconds" not in page_of(out)  # the last page stays as it is
    assert (out / "actor-lr.png").exists()


def test_watch_waits_for_a_run_that_has_not_begun(tmp_path, monkeypatch):
    run, out = tmp_path / "soon", tmp_path / "out"
    run.mkdir()

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(build.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        report(ReportConfig([run], out, watch=2))
    assert "holds no run yet" in page_of(out)


def test_pictures_of_a_former_report_do_not_stay(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "write_png", lambda chart, file: file.write_bytes(b""))
    runs = [make_run(f"r{i}", config={"objectives": {"opd_top1": 1, "oprd": i}}) for i in (0, 1)]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.png").write_bytes(b"not of a report")
    report(ReportConfig(runs, out))
    assert (out / "mu-sweep.png").exists()
    report(ReportConfig(runs[:1], out))
    assert {f.stem for f in out.glob("*.png")} == {*figures_of(page_of(out)), "mine"}


def test_sets_whose_names_are_alike_have_charts_of_their_own(written, make_run):
    run = make_run("demo")
    with (run / "metrics.jsonl").open("a") as file:
        for name in ("a.b", "a-b", "值", "集"):
            for step in (5, 10, 15):
                file.write(json.dumps(evaluation(step + 20, "student", 0.5, name)) + "\n")
    keys = [k for k in figures_of(written(run)) if k.startswith(("accuracy-", "final-"))]
    assert len([k for k in keys if k.endswith("-step") or "-step-" in k]) == 5


NASTY = (
    None, True, -1, 0, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", "text", "\x00", [],
    [None, "x", [1]], {}, {"a": {"b": []}}, {"val": {"avg": "x"}}, [[[]]],
)  # fmt: skip


def mutated(value, rng):
    """The value with something nasty somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return value | {key: mutated(value[key], rng)}
    return rng.choice(NASTY)


@pytest.mark.parametrize("seed", [*range(8), 28])
def test_files_with_nasty_values_never_end_in_a_traceback(seed, written, make_run):
    rng = random.Random(seed)
    run = make_run("demo", steps=6, config={"objectives": {"opd_top1": 1, "oprd": 1}})
    sample = {"step": 0, "model": "student", "set": "val", "prompt": "p", "response": "r",
              "answer": "a", "score": 1.0}  # fmt: skip
    (run / "samples.jsonl").write_text((json.dumps(sample) + "\n") * 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        lines = [mutated(line, rng) if rng.random() < 0.5 else line for line in lines]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("summary.json", "config.yaml"):
        (run / name).write_text(json.dumps(mutated(json.loads((run / name).read_text()), rng)))
    other = make_run("other", steps=6)
    page = written(run, other)
    assert "other" in page
    assert figures_of(page)

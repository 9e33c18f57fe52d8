"""What oprd-gains and oprd-compare show fits a terminal of 80 columns."""

import json

import pytest
from matplotlib.figure import Figure

from oprd.benchmark import compare
from oprd.benchmark.compare import CompareConfig, Result
from oprd.benchmark.config import GainsConfig
from oprd.benchmark.gains_plan import check, make_plan, model_config, shape_of
from oprd.benchmark.gains_tables import measured_tables, paper_table, prediction_tables
from oprd.benchmark.report import summary
from oprd.benchmark.update import PARTS, Measured
from oprd.cli import gains as gains_cli
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES
from tests.support.screens import check_fits


def planned(**changes):
    cfg = GainsConfig(**changes).with_shape()
    check(cfg, dry_run=True)
    shape = shape_of(model_config(cfg), "student")
    return cfg, shape, make_plan(cfg, shape, None, on_gpu=True)


def test_predictions_fit_and_explain_every_peak():
    cfg, shape, plan = planned(d=8192, layers=80, batch=64, tokens=16384, dtype="bfloat16")
    lines = check_fits([*prediction_tables(cfg, shape, plan), paper_table()])
    text = " ".join(line.strip() for line in lines)
    for moments in plan.peaks.values():
        for moment in moments.values():
            largest = max(moment.terms, key=moment.terms.get)
            assert f"{largest} {moment.terms[largest] / 2**20:,.0f}" in text
    assert "Why the two differ:" in text


@pytest.mark.parametrize("mode", ["on", "equal"])
def test_measurements_fit(mode):
    cfg, _, plan = planned(gradient_checkpointing=mode)
    results = {name: Measured() for name in PLANNER_OBJECTIVES}
    for measured in results.values():
        measured.seconds, measured.delta_peaks = [1234.567], [123456 * 2**20]
        measured.parts = [dict.fromkeys(PARTS, 123.4567)]
    rows = summary(
        results,
        {kind: [99.0] for kind in ("states", "last", "logits")},
        plan.peaks[mode],
        plan.blocks[mode],
    )
    report = {"config": {"k": cfg.k}, "modes": {mode: rows}, "limit_bytes": plan.limit}
    lines = check_fits(measured_tables(report, mode))
    shown = sum(line.count("123.457") for line in lines)
    assert shown == len(PARTS) * len(PLANNER_OBJECTIVES)  # no part is left out


@pytest.mark.parametrize(
    ("d", "heads", "kv_heads", "intermediate"),
    [(896, 14, 2, 4864), (1536, 12, 2, 8320), (3584, 28, 4, 19456), (128, 2, 1, 640),
     (100, 2, 1, 512), (2, 1, 1, 128)],
)  # fmt: skip
def test_heads_follow_from_the_width(d, heads, kv_heads, intermediate):
    cfg = GainsConfig(d=d).with_shape()
    assert (cfg.heads, cfg.kv_heads, cfg.intermediate) == (heads, kv_heads, intermediate)
    check(cfg, dry_run=False)
    assert GainsConfig(d=d, heads=1, kv_heads=1).with_shape().heads == 1


def test_an_odd_width_is_refused(capsys):
    with pytest.raises(SystemExit):
        gains_cli.main(["--d", "97", "--dry_run"])
    assert "d must be a multiple of 2 * heads" in capsys.readouterr().err


def test_json_is_all_that_is_printed(capsys):
    gains_cli.main(["--d", "128", "--dry_run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["heads"] == report["shape"]["heads"] == 2
    oprd = report["modes"]["on"]["oprd"]
    assert oprd["predicted_bytes"] == sum(oprd["predicted_terms"].values()) > 0
    assert report["paper"]["OPRD with both"]["paper_bytes"] == int(20.5 * 2**30)


@pytest.fixture
def comparison():
    cfg = CompareConfig(seeds=[0, 1, 2])
    seconds = dict.fromkeys(compare.PHASES, 12345.6)
    curve = [(0, 0.0, 0.1), (10, 54321.0, 0.96), (20, 99999.0, 0.97)]
    runs = [Result(curve, 0.9, seconds, 78.9, 123456.0) for _ in cfg.seeds]
    results = dict.fromkeys(cfg.variants, runs)
    rates = dict.fromkeys(cfg.variants, 3e-4)
    return cfg, results, compare.summarise(cfg, {"val": 1.0, "test": 1.0}, rates, results)


def test_a_comparison_fits(comparison):
    cfg, _, report = comparison
    lines = check_fits(compare.screen(cfg, report))
    row = compare.markdown(cfg, report).splitlines()[-1].strip("| ").split(" | ")
    shown = " ".join(line for line in lines if line.startswith(row[0]))
    assert all(cell in shown for cell in row)


def test_its_figures_legend_covers_no_data(comparison, monkeypatch, tmp_path):
    cfg, results, _ = comparison
    covered = []

    def measured(figure, path, **options):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        boxes = [axis.get_tightbbox() for axis in figure.axes]
        covered.extend(legend.get_window_extent().overlaps(box) for box in boxes)
        assert {text.get_text() for text in legend.get_texts()} == {*results, "teacher"}

    monkeypatch.setattr(Figure, "savefig", measured)
    compare.plot(cfg, 1.0, results, tmp_path / "x.png")
    assert covered == [False, False]

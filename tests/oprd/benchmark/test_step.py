"""`oprd-gains --step`: the arithmetic on hand-made numbers, and a small measurement of the demo."""

import json
import logging
import time

import pytest
import torch

from oprd.benchmark import step, step_idle, step_memory, step_plan
from oprd.benchmark.step_config import CONFIGURED, OPRD, ROWS, StepConfig, title, variant
from oprd.benchmark.step_flops import (
    Lengths,
    StepFlops,
    forward_flops,
    measured_peak,
    step_flops,
)
from oprd.benchmark.step_report import (
    idle_shares,
    length_note,
    middle_steps,
    noise_note,
    speeds,
    three_ways,
)
from oprd.benchmark.step_tables import prediction_table, tables
from oprd.benchmark.step_trainer import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    PHASES,
    REST,
    ROLLOUT,
    STUDENT_UPDATE,
    SYNC,
    TEACHER,
    MeasuredTrainer,
    Span,
    Step,
    by_phase,
)
from oprd.cli import gains as gains_cli
from oprd.config import LoraConfig
from oprd.config.demo import demo_config
from oprd.errors import ConfigError
from oprd.memory_plan.shapes import Shape
from oprd.report.step_pictures import charts, planned_levels
from oprd.training.preflight import preflight
from tests.support.runs import lines, set_options
from tests.support.screens import check_fits

SMALL = [
    "--step", "--device", "cpu", "--rollout.prompts_per_step", "8", "--data.train.limit", "64",
]  # fmt: skip


def made(rollout=1.0, teacher=0.5, forward=1.0, backward=2.0, optimizer=0.25, rest=0.25, **more):
    seconds = dict.fromkeys(PHASES, 0.0) | {
        ROLLOUT: rollout, TEACHER: teacher, FORWARD: forward, BACKWARD: backward,
        OPTIMIZER: optimizer, REST: rest,
    }  # fmt: skip
    inside = teacher + forward + backward + optimizer + 0.05
    lengths = Lengths([2, 2], [3, 5], [5, 7])
    given = {"cpu": 2.0, "cpu_inside": 1.0, "delta_peak": 1, "truncated": 0} | more
    return Step(seconds, inside, lengths=lengths, **given)


def test_the_three_ways_of_counting():
    oprd = [made(), made(rollout=3.0)]
    own = [made(rollout=2.0, forward=2.0), made(rollout=6.0, forward=2.0)]
    equal = [made(rollout=0.0, rest=0.1, forward=4.0)]
    ways = three_ways(own, equal, oprd)
    assert ways["own"] == pytest.approx((7.0 + 11.0) / 2)
    assert ways["update"] == pytest.approx(4.0 + 2.0 + 0.25)
    # OPRD's rollouts (2.0 on average) and rest (0.25 - 0.05), and this objective's own inside.
    assert ways["equal"] == pytest.approx(2.0 + 0.2 + (0.5 + 4.0 + 2.0 + 0.25 + 0.05))
    same = three_ways(oprd, oprd, oprd)
    assert same["equal"] == pytest.approx(same["own"])


def test_a_step_is_that_of_the_median_round():
    fast, middle, slow = (made(rollout=r) for r in (1.0, 2.0, 9.0))
    assert middle_steps([[slow, fast], [fast, slow], [middle, middle]]) == [middle, middle]
    assert middle_steps([[slow, fast], [fast, slow]]) == [fast, fast]


def test_phases_add_up_to_the_step():
    spans = [
        Span(SYNC, 0.0, 1.0), Span(ROLLOUT, 1.0, 3.0),
        Span(TEACHER, 3.0, 3.5), Span(FORWARD, 3.5, 4.5), Span(STUDENT_UPDATE, 3.5, 6.0),
        Span(TEACHER, 6.0, 6.5), Span(FORWARD, 6.5, 7.0), Span(STUDENT_UPDATE, 6.5, 8.0),
        Span(STUDENT_UPDATE, 8.0, 8.25), Span("saving", 8.25, 8.5),
    ]  # fmt: skip
    seconds = by_phase(spans, 9.0)
    assert seconds == pytest.approx(
        {
            ROLLOUT: 2.0, TEACHER: 1.0, FORWARD: 1.5, BACKWARD: 2.5, OPTIMIZER: 0.25, SYNC: 1.0,
            "gap check": 0.0, REST: 0.75,
        }
    )  # fmt: skip
    assert sum(seconds.values()) == pytest.approx(9.0)


SHAPE = Shape(d=4, layers=3, heads=2, kv_heads=1, head_dim=2, intermediate=8, vocab=10, tied=False)
BLOCK = 2 * 4 * (2 + 1) * 2 + 3 * 4 * 8
"""Weights of a block of `SHAPE`."""


def test_flops_of_a_forward():
    # Sequences of 2 and 3 tokens see 1 + 2 and 1 + 2 + 3 tokens; 4 logits.
    expected = 2 * 3 * BLOCK * 5 + 4 * 3 * (2 * 2) * (3 + 6) + 2 * 10 * 4 * 4
    assert forward_flops(SHAPE, 3, [2, 3], 4) == expected


def test_flops_of_a_step_are_those_that_the_objective_needs():
    lengths = Lengths([1, 1], [1, 2], [2, 4])
    sampled = forward_flops(SHAPE, 3, [2, 3], 3)
    head = 2 * 10 * 4 * 3
    cfg = demo_config()
    assert step_flops(cfg, SHAPE, SHAPE, lengths) == StepFlops(
        sampled, forward_flops(SHAPE, 3, [2, 4], 0), 3 * forward_flops(SHAPE, 3, [2, 3], 0)
    )
    last = variant("oprd_last", set_options(demo_config(), {"distill__layers": [0]}), StepConfig())
    assert last.distill.layers == "last"
    first = set_options(demo_config(), {"distill__layers": [0]})  # blocks above get no gradient
    assert step_flops(first, SHAPE, SHAPE, lengths).update == 3 * forward_flops(SHAPE, 1, [2, 3], 0)
    for name in ("opd_full", "opd_full_chunked"):
        found = step_flops(variant(name, cfg, StepConfig()), SHAPE, SHAPE, lengths)
        chunked = name.endswith("chunked")  # then the teacher's head runs in the update
        assert found.update == 3 * sampled + (head if chunked else 0)
        assert found.teacher == forward_flops(SHAPE, 3, [2, 4], 0) + (0 if chunked else head)
    cfg.student.lora = LoraConfig(rank=4)
    assert step_flops(cfg, SHAPE, SHAPE, lengths).update == 2 * forward_flops(SHAPE, 3, [2, 3], 0)


def test_speeds_and_utilisation():
    steps = [made(), made()]
    flops = StepFlops(rollout=10.0, teacher=20.0, update=65.0)
    found = speeds(steps, flops, peak=100.0)
    assert found["sampled_per_second"] == 8.0  # tokens of two responses in one second
    assert found["tokens_per_second"] == pytest.approx(8 / 5.0)
    assert found["trained_per_second"] == pytest.approx(12 / 3.8)
    assert found["update_mfu"] == pytest.approx(65 / (3.25 * 100))
    assert found["step_mfu"] == pytest.approx(95 / (5.0 * 100))
    assert speeds(steps, None, 1.0)["step_mfu"] is None


def test_idle_shares():
    steps = [made()]  # 5 s, 3.8 of them inside, 1 of rollout
    on_cpu = idle_shares(steps, False, (None, None), threads=2, elsewhere=False)
    assert on_cpu == pytest.approx({"update": 1 - 1 / 7.6, "step": 1 - 2 / 10})
    assert idle_shares(steps, False, (None, None), 2, elsewhere=True)["step"] is None
    on_gpu = idle_shares(steps, True, (0.5, 0.1), 2, elsewhere=False)
    assert on_gpu == pytest.approx({"update": 0.1, "step": (0.5 + 0.38 + 0.2) / 5})
    assert idle_shares(steps, True, (None, 0.1), 2, True) == {"update": 0.1, "step": None}


def test_the_union_of_kernels():
    a = torch.randn(300, 300)
    assert step_idle.covered([]) == 0
    assert step_idle.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    share = step_idle.idle_share(torch.device("cpu"), lambda: (a.sum(), time.sleep(0.2)))
    assert 0.8 < share < 1.0
    busy = step_idle.idle_share(torch.device("cpu"), lambda: [a @ a for _ in range(200)])
    assert step_idle.idle_share(torch.device("cpu"), lambda: None) is None  # nothing was seen
    assert busy < 0.8


def test_live_bytes_by_the_phase_that_allocated():
    def event(action, addr, size, time_us):
        return {"action": action, "addr": addr, "size": size, "time_us": time_us}

    events = [
        event("alloc", 1, 10, 100), event("segment_alloc", 1, 999, 100),
        event("alloc", 2, 20, 1_500_100), event("free_requested", 1, 10, 1_600_100),
        event("free_completed", 7, 4, 1_700_100),  # from before
        event("alloc", 3, 5, 2_500_100), event("free_completed", 2, 20, 2_600_100),
    ]  # fmt: skip
    phases = [("teacher", 0.0, 1.0), ("forward", 1.0, 2.0), ("backward", 2.0, 3.0)]
    points, at_peak = step_memory.live_bytes(events, phases, 100)
    assert points == [(0.0, 10), (1.5, 30), (1.7, 26), (2.5, 31), (2.6, 11)]
    before = step_memory.BEFORE
    assert at_peak == {"teacher": 10, "forward": 20, before: -4, "backward": 5}
    assert sum(at_peak.values()) == 31


def test_a_timeline_keeps_its_peak_when_thinned():
    points = [(float(i), 7 if i == 5001 else 1) for i in range(10000)]
    kept = step_memory.thinned(points)
    assert len(kept) <= step_memory.POINTS
    assert (5001.0, 7) in kept
    assert kept == sorted(kept)


def test_resident_bytes_are_sampled():
    with step_memory.recorded(torch.device("cpu")) as recording:
        start = time.perf_counter()
        held = torch.ones(16 * 2**20)  # 64 MiB
        time.sleep(0.1)
        end = time.perf_counter()
    timeline = recording.timeline([("forward", start, end)])
    assert max(timeline.bytes) > 0.5 * held.nbytes  # sampling may begin after its first pages
    assert recording.timeline([]) is None


def test_what_can_not_be_recorded_is_warned_of(caplog):
    def fails():
        raise AttributeError("no _snapshot")

    assert step._extra("memory over time", fails) is None
    assert "memory over time: not measured" in caplog.text
    assert step._extra("idle share", lambda: 3) == 3


def test_levels_lie_on_each_other():
    resident = {
        "student's weights": 4,
        "teacher's weights": 3,
        "AdamW's moments": 8,
        "gradients": 4,
    }
    update = {"gradients": 4, "head's weight gradient": 1, "activations": 20, "logits [B,T,V]": 50}
    assert [height for _, height in planned_levels(resident, update)] == [7, 15, 20, 40, 90]
    assert planned_levels({}, {}) == []


def test_rows_change_the_objectives_alone():
    run = set_options(demo_config(), {"rollout__max_new_tokens": 100, "distill__k": 40})
    for name in ROWS:
        cfg = variant(name, run, StepConfig())
        assert set(cfg.objectives) == set(ROWS[name].objectives)
        assert (cfg.opd.implementation == "materialised") == (
            name in ("opd_top1", "opd_topk", "opd_full")
        )
        assert not cfg.eval.sets
        assert (cfg.seed, cfg.rollout, cfg.data, cfg.optim) == (
            run.seed, run.rollout, run.data, run.optim,
        )  # fmt: skip
    assert title("oprd_last_k", variant("oprd_last_k", run, StepConfig())).endswith("40 positions")
    run.distill = type(run.distill)(k=200)  # more than there are
    assert variant("oprd_last_k", run, StepConfig()).distill.k == 50
    assert StepConfig(objectives=["opd_top1"]).rows(run) == [OPRD, "opd_top1"]
    run.objectives = {"opd_top1": 1.0, "oprd": 10.0}
    assert StepConfig(objectives=[]).rows(run) == [OPRD, CONFIGURED]
    assert title(CONFIGURED, run) == "opd_top1 + 10 oprd"
    assert variant(CONFIGURED, run, StepConfig()).objectives == run.objectives


def test_wrong_settings_are_refused_together(capsys):
    bad = StepConfig(objectives=["oprd", "kd"], steps=0, rounds=0, evaluate=True)
    run = set_options(demo_config(), {"eval__sets": {}, "resume": "auto"})
    with pytest.raises(ConfigError) as refused:
        bad.check(run, ranks=2)
    for words in ("unknown kd", "step.steps", "step.rounds", "eval.sets", "resume", "torchrun"):
        assert words in str(refused.value)
    with pytest.raises(SystemExit) as code:
        gains_cli.main(
            [*SMALL, "--dry_run", "--rollout.top_p", "0.9", "--step.objectives", "[opd_top1]"]
        )
    assert code.value.code == 2
    assert "opd_top1: rollout.top_p=0.9" in capsys.readouterr().err


def test_what_does_not_fit_is_named_before_models_load(monkeypatch):
    run = set_options(demo_config(), {"data__train__limit": 64})
    rows = step_plan.prepare(run, StepConfig(objectives=["opd_top1_chunked"]), dry_run=False)
    device = torch.device("cpu")
    step_plan.check_memory(rows, device)
    rows[1].cfg.rollout.prompts_per_step *= 50
    needs = [row.plan(device, 8, 5).total for row in rows]
    assert needs[1] > needs[0]
    monkeypatch.setattr(step_plan, "available_bytes", lambda _: needs[0])
    with pytest.raises(ConfigError, match=r"opd_top1_chunked needs .*objectives '\[oprd\]'"):
        step_plan.check_memory(rows, device)


def test_a_dry_run_predicts_and_loads_nothing(monkeypatch, capsys):
    monkeypatch.setattr("oprd.training.setup.load_model", None)
    gains_cli.main([*SMALL, "--dry_run", "--json", "--step.objectives", "[opd_full]"])
    predicted = json.loads(capsys.readouterr().out)
    assert [row["objective"] for row in predicted["rows"]] == [OPRD, "opd_full"]
    by_name = {row["objective"]: row for row in predicted["rows"]}
    assert by_name[OPRD]["flops"]["update"] < by_name["opd_full"]["flops"]["update"]
    assert all(
        row["predicted_bytes"] == sum(row["predicted_terms"].values()) for row in by_name.values()
    )
    check_fits([prediction_table(predicted)])


def test_the_peak_is_of_this_machine():
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two objectives, one step, two rounds."""
    directory = tmp_path_factory.mktemp("step") / "out"
    gains_cli.main(
        [*SMALL, "--step.steps", "1", "--step.objectives", "[opd_topk_chunked]",
         "--output_dir", str(directory)]
    )  # fmt: skip
    return json.loads((directory / "step.json").read_text()), directory


@pytest.mark.slow
def test_a_measurement_of_the_demo(report):
    written, directory = report
    oprd, opd = written["rows"]
    assert (oprd["objective"], opd["objective"]) == (OPRD, "opd_topk_chunked")
    for row in written["rows"]:
        assert sum(row["seconds"].values()) == pytest.approx(row["ways"]["own"])
        for phase in (ROLLOUT, TEACHER, FORWARD, BACKWARD, OPTIMIZER, REST):
            assert row["seconds"][phase] > 0
        assert row["equal_seconds"][ROLLOUT] == 0
        assert row["ways"]["update"] < row["ways"]["equal"]
        assert 0 < row["update_mfu"] < 1.5
        assert [len(steps) for steps in row["step_seconds_by_round"]] == [1, 1]
        assert row["timeline"]["stretches"][0][0] == TEACHER
        assert max(row["timeline"]["bytes"]) > 0
    assert oprd["ways_to_oprd"] == {"update": 1.0, "equal": 1.0, "own": 1.0}
    # The same student and prompts, and with the first step's update alone no other lengths yet.
    assert abs(oprd["response_length"] - opd["response_length"]) < 1
    pictures = {f.name for f in directory.glob("*.png")}
    assert pictures == {"time_by_phase.png", "memory_oprd.png", "memory_opd_topk_chunked.png"}
    markdown = (directory / "step.md").read_text()
    assert all(name in markdown for name in pictures)
    assert written["command"] in markdown
    with pytest.raises(SystemExit):  # the report would be lost
        gains_cli.main([*SMALL, "--output_dir", str(directory)])


@pytest.mark.slow
def test_its_tables_fit(report):
    written, _ = report
    wide = json.loads(json.dumps(written))
    for row in wide["rows"]:
        row["title"] = "OPD full, materialised.."
        row["seconds"] = dict.fromkeys(PHASES, 1234.5678)
        row["ways"] = dict.fromkeys(row["ways"], 9876.5432)
        row["delta_peak_bytes"] = row["predicted_bytes"] = 123456 * 2**20
        row |= dict.fromkeys(("sampled_per_second", "trained_per_second"), 123456.0)
    for shown in (written, wide):
        text = " ".join(check_fits(tables(shown)))
        assert "raise --step.steps" in text
    assert "x OPRD" not in noise_note(written)
    longer = wide["rows"][1]
    longer["response_length"] = 1.5 * wide["rows"][0]["response_length"]
    assert "+50.0% at most" in length_note(wide)


@pytest.mark.slow
def test_bubbles_need_accuracy(report):
    written = json.loads(json.dumps(report[0]))
    assert not any(chart.paper for chart in charts(written))
    for row in written["rows"]:
        row["accuracy"] = {"val": 0.25}
    bubbles = charts(written)[-1]
    assert [b.y for b in bubbles.bubbles] == [25.0, 25.0]
    assert bubbles.bubbles[0].x == pytest.approx(2 * written["rows"][0]["ways"]["own"])


def test_the_trainer_trains_as_oprd_train_does(tmp_path, caplog):
    """The watched trainer's steps have the losses of an unwatched one, on its rollouts."""
    from oprd.training.trainer import Trainer

    found = {}
    for name in ("watched", "plain"):
        cfg = variant(OPRD, demo_config(), StepConfig())
        cfg.output_dir, cfg.steps, cfg.rollout.prompts_per_step = str(tmp_path / name), 2, 4
        cfg.data.train.limit = 16
        inputs = preflight(cfg)
        caplog.set_level(logging.WARNING, "oprd")
        trainer = MeasuredTrainer(cfg, inputs, 2) if name == "watched" else Trainer(cfg, inputs)
        with trainer.closing:
            trainer.run()
        found[name] = [line["actor/rep_loss"] for line in lines(tmp_path / name)]
    assert len(found["plain"]) == 2
    assert found["watched"] == found["plain"]
    assert not (tmp_path / "watched" / "student").exists()

"""`oprd-scaling`: the model by hand, what it reads, and what it shows."""

import json
from dataclasses import asdict, replace

import pytest

from oprd.benchmark.scaling import (
    Group,
    Machine,
    Measured,
    Model,
    Ranks,
    Throughput,
    Traffic,
    predict,
)
from oprd.benchmark.scaling_config import SOURCES, LinkConfig, ScalingConfig
from oprd.benchmark.scaling_inputs import forward_share, read, traffic
from oprd.cli.scaling import main
from oprd.config.demo import demo_config
from oprd.config.io import to_yaml
from oprd.errors import ConfigError
from oprd.memory_plan.shapes import Shape
from oprd.report.scaling import FILES
from tests.support.runs import set_options

MACHINE = Machine(2, node_rate=1000, network_rate=200, efficiency=0.5, node_latency=0.1,
                  network_latency=0.5, launch=1.0)  # fmt: skip
FREE = Machine(8, node_rate=1e30, network_rate=1e30)
SHAPE = Shape(d=8, layers=3, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=10, tied=False)
BLOCK = 2 * 8 * (2 + 1) * 4 + 3 * 8 * 16
MEASURED = Measured(ranks=1, sequences=16, tokens=100.0, micro_batches=2, teacher=4.0, update=12.0,
                    optimizer=0.8, sync=0.5)  # fmt: skip
TRAFFIC = Traffic(3, block=300.0, root=100.0, block_gradients=600.0, root_gradients=50.0)
MODEL = Model(MEASURED, TRAFFIC, replace(TRAFFIC, block_gradients=0, root_gradients=0))


def test_a_ring():
    # Three steps, three quarters of the bytes at half the rate.
    wide = replace(MACHINE, per_node=4)
    assert wide.all_gather(4000, Group(4, 4)) == pytest.approx(1 + 3 * 0.1 + 0.75 * 4000 / 500)
    # Two steps inside nodes, one between; two GPUs of a node use 2 x 200 of the network.
    assert MACHINE.all_gather(4000, Group(4, 2)) == pytest.approx(1 + 0.2 + 0.5 + 3000 / 200)
    assert MACHINE.all_gather(4000, Group(1, 1)) == 0
    assert wide.all_reduce(4000, Group(4, 4)) == pytest.approx(1 + 2 * (0.3 + 6))


def test_blocks_hide_what_is_shorter_than_they_are():
    links = Machine(4, node_rate=100, network_rate=1)
    at = Ranks(links, 4, 4)
    gather, root, scatter, root_sum = 2.25, 0.75, 4.5, 0.375  # 3/4 of the bytes at 100 a second
    # 5 seconds a block hide a gather; 1 second does not.
    assert at.forward(15, TRAFFIC) == pytest.approx(root + gather + 15)
    assert at.forward(3, TRAFFIC) == pytest.approx(root + gather + 2 * gather + 1)
    # In backward both a gather and a reduce-scatter are beside a block.
    assert at.backward(30, TRAFFIC) == pytest.approx(gather + 30 + scatter + root_sum)
    assert at.backward(3, TRAFFIC) == pytest.approx(
        gather + 2 * (gather + scatter) + 1 + scatter + root_sum
    )
    kept = replace(TRAFFIC, again=False)
    assert at.backward(3, kept) == pytest.approx(2 * scatter + 1 + scatter + root_sum)
    serial = Ranks(replace(links, overlaps=False), 4, 4)
    assert serial.forward(15, TRAFFIC) == pytest.approx(root + 3 * gather + 15)
    assert serial.backward(3, TRAFFIC) == pytest.approx(3 * (gather + scatter) + 3 + root_sum)


def test_copies_sum_their_shards():
    links = Machine(2, node_rate=100, network_rate=10)
    at = Ranks(links, 8, 2)  # four copies, of a node each
    assert at.replicas == Group(4, 1)
    # A reduce-scatter of half of 600 in the node, then an all-reduce of 300 over four nodes.
    one = 600 / 2 / 100 + 2 * 0.75 * 300 / 10
    root = 50 / 2 / 100 + 2 * 0.75 * 25 / 10
    only = replace(TRAFFIC, again=False)
    assert at.backward(0, only) == pytest.approx(3 * one + root)


def test_whole_models_sum_gradients_once():
    whole = replace(TRAFFIC, is_sharded=False)
    at = Ranks(Machine(4, 100, 1, node_latency=0.5), 4, 4)
    assert at.forward(3, whole) == at.backward(3, whole) == 3
    latency = 2 * 3 * 0.5
    # 27 tensors of three blocks: 2 x 3/4 of 1,850 bytes, and each its latency.
    rest = 26 * (latency + 2 * 0.75 / 100)
    assert at.whole_gradients(whole) == pytest.approx(latency + 1.5 * 1850 / 100 + rest)


def test_links_that_cost_nothing():
    weak = predict(MODEL, FREE, 4, "weak")
    assert (weak.teacher, weak.update, weak.sync) == pytest.approx((4, 12, 0.5))
    assert weak.waiting == pytest.approx(0)
    assert weak.optimizer == pytest.approx(0.2)  # a quarter of the weights
    assert weak.tokens_per_second == pytest.approx(6400 / 16.7)
    strong = predict(MODEL, FREE, 4, "strong")
    assert (strong.sequences, strong.teacher, strong.update) == pytest.approx((4, 1, 3))
    # Nobody can have less than a sequence.
    most = predict(MODEL, FREE, 64, "strong", Throughput(50.0, 4.0))
    assert (most.sequences, most.update, most.rollout) == pytest.approx((1, 12 / 16, 25))
    assert most.tokens == 1600
    assert predict(MODEL, FREE, 4, "strong", Throughput(50.0)).rollout == pytest.approx(8)
    # Sampled beside the training of 4 + 12 + 0.2 seconds.
    beside = replace(MODEL, samples_beside=True)
    assert predict(beside, FREE, 4, "weak", Throughput(50.0)).rollout == pytest.approx(32 - 16.2)
    assert predict(beside, FREE, 4, "weak", Throughput(500.0)).rollout == 0


def test_ranks_share_cores():
    one = replace(FREE, cores=2)
    assert predict(MODEL, one, 2, "weak").update == pytest.approx(12)
    assert predict(MODEL, one, 3, "weak").update == pytest.approx(18)
    on_three = replace(MODEL, measured=replace(MEASURED, ranks=3, sequences=48))
    assert predict(on_three, one, 1, "weak").update == pytest.approx(8)


@pytest.mark.parametrize("shard_size", [None, 2])
def test_what_was_measured_on_several_ranks_contains_their_waiting(shard_size):
    links = Machine(2, node_rate=3000, network_rate=1500, node_latency=1e-3)
    model = replace(MODEL, shard_size=shard_size)
    # Measured on 1, predicted for 4; measured as that, it is predicted for 1.
    four = predict(model, links, 4, "weak")
    assert four.waiting > 0
    at = model.ranks(links, 4)
    teacher = 2 * at.forward(2.0, model.teacher)
    measured = replace(
        MEASURED, ranks=4, sequences=64, teacher=teacher, update=16 + four.waiting - teacher,
        optimizer=four.optimizer, sync=four.sync,
    )  # fmt: skip
    back = predict(replace(model, measured=measured), links, 1, "weak")
    first = predict(model, links, 1, "weak")
    for part in ("teacher", "update", "waiting", "optimizer", "sync", "step"):
        assert getattr(back, part) == pytest.approx(getattr(first, part), rel=1e-6, abs=1e-6), part


def test_what_a_run_sends():
    def sent(**changes):
        options = {"student__dtype": "float32", "teacher__dtype": "bfloat16", **changes}
        cfg = set_options(demo_config(), options)
        return traffic(cfg, SHAPE, {"": SHAPE}, sharded=True)

    student, teacher = sent()
    assert student == Traffic(3, 4 * BLOCK, 2 * 4 * 80, True, 4 * BLOCK, 4 * 80)
    assert teacher == Traffic(3, 2 * BLOCK, 2 * 80)  # without its head
    narrow, _ = sent(fsdp__param_dtype="bfloat16", fsdp__reduce_dtype="bfloat16")
    assert (narrow.block, narrow.block_gradients) == (2 * BLOCK, 2 * BLOCK)
    cut, kept = sent(distill__layers=[0])
    assert (cut.blocks, kept.blocks) == (3, 1)
    with_head, whole = sent(objectives={"oprd": 1.0, "opd_top1": 1.0})
    assert (with_head.root_gradients, whole.root) == (2 * 4 * 80, 2 * 2 * 80)
    adapter, _ = sent(student__lora__rank=2)
    inputs_and_outputs = 4 * 8 + 8 + 4 + 8 + 4 + 3 * (8 + 16)
    assert adapter.block_gradients == 4 * 2 * inputs_and_outputs
    assert adapter.root_gradients == 0
    assert not sent(fsdp__teacher="replicated")[1].is_sharded
    shared = sent(teacher__path="self:current")[1]
    assert (shared.block, shared.block_gradients) == (student.block, 0)


def test_the_forwards_share():
    assert (forward_share(0), forward_share(1)) == (1 / 3, 1 / 4)


@pytest.fixture
def run(tmp_path):
    """What a run of the demo on two ranks has left."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(demo_config()))
    step = {
        "time/teacher_s": 0.1, "time/student_update_s": 0.5, "perf/optimizer_s": 0.1,
        "perf/ranks": 2, "perf/micro_batches": 1, "response_length/mean": 4.5,
    }  # fmt: skip
    slow = step | {"time/teacher_s": 9.0}
    lines = [slow, slow, step, step, {"step": 4, "val/avg@1": 0.5}]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut')
    return directory


def test_a_run_is_read(run):
    source = read(run, "oprd", "on")
    m = source.model.measured
    assert (m.ranks, m.sequences, m.tokens, m.sync) == (2, 64, 4.5, None)
    assert (m.teacher, m.update, m.optimizer) == pytest.approx((0.1, 0.4, 0.1))
    eight, one = source.memory(8, 512), source.memory(1, 64)
    assert eight is not None
    assert one is not None
    assert eight < one


def test_the_tables_fit_80_columns_and_name_every_input(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    main(["--measured", str(run), "--output_dir", str(out), "--rollout_tokens_per_second", "9000",
          "--links.network_gbs", "25", "--gpus", "[2, 8, 512]"])  # fmt: skip
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("PREDICTION", "weak", "strong", "25 (given)", "9,000 tokens/s", *SOURCES):
        assert words in shown, words
    assert {f.name for f in out.iterdir()} == set(FILES)
    written = json.loads((out / FILES[0]).read_text())
    assert "prediction" in written["what"]
    weak = written["steps"]["weak"]
    assert [s["ranks"] for s in weak] == [2, 8, 512]
    # What was measured comes back: 0.6 s, and the rollouts of 32 sequences.
    assert weak[0]["step"] == pytest.approx(0.6 + 32 * 4.5 / 9000)
    main(["--measured", str(run), "--json"])
    assert "rollout" not in [k for s in json.loads(capsys.readouterr().out)["steps"]["weak"]
                             for k, v in s.items() if v is not None]  # fmt: skip


def test_a_report_of_gains_is_read(tmp_path):
    row = {
        "objective": "oprd", "seconds": 0.5, "teacher_forward_seconds": 0.1,
        "parts": {"backbone forward": 0.1, "backbone backward": 0.4},
    }  # fmt: skip
    report = {
        "machine": {"device": "a GPU", "torch": "2.13"}, "shape": asdict(SHAPE),
        "config": {"batch": 2, "tokens": 40, "prompt": 10, "dtype": "bfloat16",
                   "teacher": {"path": None}},
        "modes": {"on": [row]},
    }  # fmt: skip
    file = tmp_path / "gains.json"
    file.write_text(json.dumps(report))
    source = read(tmp_path, "oprd", "on")
    assert source.scalings == ("weak",)
    model = source.model
    assert (model.measured.tokens, model.measured.forward_share) == pytest.approx((30, 0.2))
    assert model.student == Traffic(3, 2 * BLOCK, 320, True, 4 * BLOCK, 320)
    with pytest.raises(ConfigError, match=r"no 'oprd' with gradient_checkpointing=off"):
        read(file, "oprd", "off")


def test_wrong_inputs_are_named(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"none holds no measurement: name the directory of a run"
    ):
        read(tmp_path / "none", "oprd", "on")
    (tmp_path / "gains.json").write_text("{")
    with pytest.raises(ConfigError, match=r"neither the directory of a run"):
        read(tmp_path, "oprd", "on")
    (run / "metrics.jsonl").write_text('{"time/student_update_s": 1.0}\n')
    with pytest.raises(ConfigError, match=r"does not record .*perf/ranks.* Measure again"):
        read(run, "oprd", "on")
    wrong = ScalingConfig(gpus=[0], sequence_tokens_per_second=3.0, links=LinkConfig(efficiency=2))
    with pytest.raises(ConfigError) as error:
        wrong.check()
    for words in ("measured is not given", "gpus (0)", "without rollout_tokens", "at most 1"):
        assert words in str(error.value)

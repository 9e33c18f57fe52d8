"""`oprd-gains`: what is measured is the objective itself, and the planner agrees with it."""

import json
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from oprd.benchmark import gains
from oprd.benchmark.config import GainsConfig
from oprd.benchmark.gains_plan import GainsPlan, check_memory, make_plan, update_of
from oprd.benchmark.report import PAPER_GIB, PAPER_SHAPE, paper_rows
from oprd.benchmark.update import PARTS, ActorUpdate, Laps
from oprd.cli import gains as gains_cli
from oprd.errors import ConfigError
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES
from oprd.memory_plan.shapes import Shape, Update
from oprd.memory_plan.update import predict
from oprd.models.recompute import recompute_blocks
from oprd.observability.memory import GIB, freed_at_once

TINY_FLAGS = """--d 32 --layers 3 --heads 4 --kv_heads 2 --intermediate 48 --vocab 80 --batch 2
    --tokens 12 --prompt 3 --rounds 2 --k 4 --chunk 5 --device cpu"""
TINY = TINY_FLAGS.split()


def model(d, layers, heads, kv_heads, intermediate, vocab, tied, dtype=torch.float32):
    config = Qwen2Config(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocab,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gains") / "out"
    gains_cli.main([*TINY, "--output_dir", str(directory)])
    written = json.loads((directory / "gains.json").read_text())
    return written, (directory / "gains.md").read_text()


def equal_plan(**changes):
    cfg = GainsConfig(gradient_checkpointing="equal", dtype="bfloat16", **changes).with_shape()
    shape = replace(PAPER_SHAPE, layers=8)
    return make_plan(cfg, shape, None, on_gpu=True), cfg, shape


def test_equal_memory_takes_the_fewest_blocks_that_fit():
    plan, cfg, shape = equal_plan(batch=2, tokens=1024)
    full = make_plan(replace(cfg, gradient_checkpointing="on"), shape, None, on_gpu=True)
    assert plan.limit == max(
        full.peaks["on"][o].total for o in ("opd_top1", "opd_topk", "opd_full")
    )
    blocks, peaks = plan.blocks["equal"], plan.peaks["equal"]
    for name, chosen in blocks.items():
        assert peaks[name].total <= plan.limit
        if chosen:
            update = update_of(cfg, chosen - 1, True, shape.vocab)
            assert predict(name, shape, update).total > plan.limit
    assert blocks["oprd"] < blocks["opd_full"]
    less, _, _ = equal_plan(batch=2, tokens=1024, objectives=["backbone"], memory_gb=0.6)
    assert less.limit == int(0.6 * GIB)
    assert 0 < less.blocks["equal"]["oprd"] < 8
    with pytest.raises(ConfigError, match=r"memory_gb=0.1 .*oprd .*Raise it"):
        equal_plan(batch=2, tokens=1024, objectives=["backbone"], memory_gb=0.1)


@pytest.mark.slow
def test_equal_memory_is_measured(tmp_path):
    gains_cli.main(
        [*TINY, "--objectives=[oprd,opd_topk]", "--gradient_checkpointing", "equal",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    written = json.loads((tmp_path / "out" / "gains.json").read_text())
    rows = {row["objective"]: row for row in written["modes"]["equal"]}
    assert list(rows) == ["oprd", "opd_topk"]
    assert all(row["predicted_bytes"] <= written["limit_bytes"] for row in rows.values())
    assert rows["oprd"]["recomputed_blocks"] <= rows["opd_topk"]["recomputed_blocks"]
    assert "| blocks recomputed |" in (tmp_path / "out" / "gains.md").read_text()


@pytest.mark.slow
def test_everything_is_measured_in_both_modes(report):
    written, markdown = report
    assert list(written["modes"]) == ["on", "off"]
    for rows in written["modes"].values():
        assert [row["objective"] for row in rows] == list(PLANNER_OBJECTIVES)
        for row in rows:
            assert len(row["seconds_by_round"]) == 2
            assert row["seconds"] in row["seconds_by_round"]
            assert sum(row["predicted_terms"].values()) == row["predicted_bytes"]
    assert written["shape"]["d"] == 32
    assert written["rows"] == 2 * 9
    assert written["command"].startswith("oprd-gains --d 32")
    assert written["command"] in markdown
    assert "OPD top-4, chunked" in markdown


@pytest.mark.slow
def test_parts_add_up_and_are_where_they_belong(report):
    for rows in report[0]["modes"].values():
        for row in rows:
            parts, name = row["parts"], row["objective"]
            assert list(parts) == list(PARTS)
            assert sum(parts.values()) == pytest.approx(row["seconds"])
            assert parts["backbone forward"] > 0
            assert (parts["backbone backward"] > 0) == (name != "logprob")
            calls_head = name.startswith("opd") or name == "logprob"
            assert (parts["LM head forward"] > 0) == calls_head
            assert (parts["loss from logits"] > 0) == calls_head
            assert (parts["LM head backward"] > 0) == name.startswith("opd")
            assert (parts["teacher's LM head"] > 0) == name.endswith("chunked")
            assert (parts["loss backward"] > 0) == (name in ("opd_top1", "opd_topk", "opd_full"))
            assert (parts["distillation term"] > 0) == (name in ("oprd", "oprd_last", "bridge"))


@pytest.mark.slow
def test_ratios_and_step(report):
    for rows in report[0]["modes"].values():
        by_name = {row["objective"]: row for row in rows}
        oprd, extra = by_name["oprd"], by_name["logprob"]["seconds"]
        for name, row in by_name.items():
            assert row["time_to_oprd"] == pytest.approx(row["seconds"] / oprd["seconds"])
            base = by_name["backbone"]["seconds"]
            assert row["time_to_backbone"] == pytest.approx(row["seconds"] / base)
            if name in ("backbone", "logprob"):
                assert row["step_seconds"] is None
                continue
            step = row["seconds"] + row["teacher_forward_seconds"]
            step += extra if name in ("opd_top1", "opd_topk", "opd_full") else 0.0
            assert row["step_seconds"] == pytest.approx(step)
            assert row["step_to_oprd"] == pytest.approx(step / oprd["step_seconds"])


def plain_loss(actor, objective):
    """The definitions, from logits and `output_hidden_states`."""
    out = actor.student(input_ids=actor.ids, use_cache=False, output_hidden_states=True)
    ready, rows = actor.ready, actor.rows
    states = [h.flatten(0, 1)[rows] for h in out.hidden_states[1:]]
    if objective == "backbone":
        return (out.hidden_states[-1] * actor.end_gradient).sum()
    if objective == "oprd_last":
        return (states[-1] - ready.last).pow(2).mean()
    if objective == "oprd":
        pairs = zip(states, ready.states, strict=True)
        return torch.stack([(s - t).pow(2).mean() for s, t in pairs]).mean()
    if objective == "bridge":
        unit = torch.nn.functional.normalize
        triples = zip(states, actor.projectors, ready.bridged, strict=True)
        losses = [(unit(s @ p.T, dim=-1) - unit(t, dim=-1)).pow(2).mean() for s, p, t in triples]
        return torch.stack(losses).mean()
    log_p = out.logits.flatten(0, 1)[rows].log_softmax(-1)
    log_q = ready.logits.flatten(0, 1)[rows].log_softmax(-1)
    form = objective.split("_")[1]
    if form == "full":
        return (log_p.exp() * (log_p - log_q)).sum() / len(rows)
    at = actor.sampled[:, None] if form == "top1" else log_p.topk(4).indices
    log_p, log_q = log_p.gather(-1, at), log_q.gather(-1, at)
    if "_set_" in objective:  # both renormalised
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum() / len(rows)
    weight = log_p.detach().softmax(-1)
    return (weight * (log_p - log_q).detach() * log_p).sum() / len(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [name for name in PLANNER_OBJECTIVES if name != "logprob"])
def test_gradients_are_those_of_the_definition(objective, checkpointing):
    student = model(32, 3, 4, 2, 48, 80, tied=True)
    actor = ActorUpdate(student, batch=2, tokens=12, prompt=3, k=4, chunk=5)
    actor.zero_gradients()
    plain_loss(actor, objective).backward()
    expected = [p.grad.clone() for p in student.parameters()]
    assert any(g.abs().max() > 0 for g in expected)
    recompute_blocks(student, checkpointing)
    actor.zero_gradients()
    with actor.prepared(objective) as run:
        run(Laps(actor.device))
    for parameter, want in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-6)


def test_another_teacher_is_used():
    student, teacher = (model(32, 3, 4, 2, 48, vocab, tied=True) for vocab in (80, 96))
    actor = ActorUpdate(student, teacher, batch=2, tokens=12, prompt=3)
    assert actor.ready.logits.shape == (2, 12, 96)
    assert actor.ids.max() < 80
    for what in ("states", "last", "logits"):
        assert actor.teacher_seconds(what) > 0


@pytest.mark.parametrize("tied", [True, False])
def test_shape_counts_parameters(tied):
    made = model(64, 2, 4, 2, 352, 1000, tied)
    shape = Shape.of(made.config)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in made.parameters()), rel=0.01)


@pytest.mark.parametrize("attention", ["causal", "sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_activations_are_what_autograd_saves(dtype, autocast, attention):
    """Two blocks minus one: per token, to the byte."""
    ids = torch.zeros(2, 50, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0 if attention == "sdpa" else 1

    def saved_bytes(layers):
        made = model(64, layers, 4, 2, 352, 100, True, dtype).train()
        made.set_attn_implementation("sdpa" if attention == "causal" else attention)
        weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
        seen = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        narrowed = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with saved_tensors_hooks(pack, lambda tensor: tensor), narrowed:
            states = made.model(ids, attention_mask=mask, use_cache=False)
        assert states is not None
        return sum(seen.values())

    shape = Shape.of(model(64, 1, 4, 2, 352, 100, True).config)
    per_block = saved_bytes(2) - saved_bytes(1)
    e = 2 if autocast else dtype.itemsize
    copies = e * shape.block_parameters if e < dtype.itemsize else 0
    about = Update(
        2, 50, 0, e, stream_bytes=dtype.itemsize, span=0 if attention == "causal" else 50,
        eager=attention == "eager",
    )  # fmt: skip
    assert per_block == 100 * shape.block_activations(about) + copies


FIELDS = ("d", "layers", "heads", "kv_heads", "intermediate", "vocab")
LOGITS = dict(zip(FIELDS, (64, 2, 4, 2, 128, 40000), strict=True))
BLOCKS = dict(zip(FIELDS, (512, 3, 8, 2, 1536, 500), strict=True))
TABLES = dict(zip(FIELDS, (512, 2, 8, 2, 512, 60000), strict=True))
BY_LOGITS = ("opd_top1", "opd_topk", "opd_full", "opd_top1_chunked", "opd_topk_chunked",
             "opd_topk_set_chunked", "opd_full_chunked", "logprob")  # fmt: skip
CASES = [
    *((LOGITS, tied, torch.float32, True, name) for tied in (True, False) for name in BY_LOGITS),
    *((LOGITS, True, torch.bfloat16, True, name) for name in BY_LOGITS),
    *((BLOCKS, True, dtype, checkpointing, name) for dtype in (torch.float32, torch.bfloat16)
      for checkpointing in (True, False) for name in ("backbone", "oprd", "bridge")),
    *((BLOCKS, True, torch.float32, blocks, "oprd") for blocks in (1, 2)),
    (BLOCKS, True, torch.bfloat16, 1, "oprd"),
    *((TABLES, True, torch.float32, True, name)
      for name in ("backbone", "oprd", "opd_top1", "opd_top1_chunked")),
]  # fmt: skip


def tensor_peak(run):
    """Bytes of tensors alive at once during a call, by the profiler's record of every allocation:
    what a library takes for its own workspace, which differs between machines, is not in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in sizes))


@pytest.mark.parametrize(("sizes", "tied", "dtype", "checkpointing", "objective"), CASES)
def test_planner_predicts_what_tensors_take(sizes, tied, dtype, checkpointing, objective):
    student = model(**sizes, tied=tied, dtype=dtype)
    batch, tokens = (2, 512) if sizes is BLOCKS else (2, 160)
    actor = ActorUpdate(student, batch=batch, tokens=tokens, prompt=16, chunk=64)
    recompute_blocks(student, checkpointing)
    actor.zero_gradients()
    with actor.prepared(objective) as update:
        measured = tensor_peak(lambda: update(Laps(actor.device)))
    about = Update(
        batch, tokens, actor.count, dtype.itemsize, checkpointing=checkpointing, chunk=64
    )
    moment = predict(objective, Shape.of(student.config), about)
    assert moment.total == pytest.approx(measured, rel=0.1), (moment, measured)


def test_peak_of_the_process_holds_the_tensors():
    student = model(**LOGITS, tied=True)
    actor = ActorUpdate(student, batch=2, tokens=160, prompt=16, chunk=64)
    with freed_at_once():
        measured = actor.measure("opd_topk").delta_peak
    if measured is None:
        pytest.skip("this system has no high-water mark to reset (/proc/self/clear_refs)")
    about = Update(2, 160, actor.count, checkpointing=False, chunk=64)
    least = predict("opd_topk", Shape.of(student.config), about).total
    assert 0.95 * least < measured < 2 * least


def test_planner_in_the_large():
    update = Update(batch=8, tokens=4096, rows=8 * 4000, dtype_bytes=2)
    peaks = {name: predict(name, PAPER_SHAPE, update).total for name in PLANNER_OBJECTIVES}
    assert peaks["oprd"] <= 1.05 * peaks["backbone"]
    assert peaks["oprd"] < peaks["opd_top1_chunked"] < peaks["opd_top1"] < peaks["opd_full"]
    without = predict("oprd", PAPER_SHAPE, replace(update, checkpointing=False)).total
    assert without > 5 * peaks["oprd"]
    sharded = predict("oprd", PAPER_SHAPE, replace(update, shards=8))
    assert any(name.startswith("gathered weights") for name in sharded.terms)
    with pytest.raises(ValueError, match="objective must be one of"):
        predict("sft", PAPER_SHAPE, update)


def test_papers_run_is_set_beside_its_numbers(capsys):
    reported = {value for _, _, value in paper_rows() if value is not None}
    assert reported == set(PAPER_GIB.values())
    with_both = next(m for name, m, _ in paper_rows() if name == "OPRD with both")
    assert with_both.total / GIB == pytest.approx(PAPER_GIB["oprd"], rel=0.2)
    gains_cli.main([*TINY, "--dry_run", "--shards", "4"])
    shown = capsys.readouterr().out
    assert "the paper's run" in shown
    assert "predicted" in shown


def fails(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        gains_cli.main(list(flags))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tokens 16 --prompt 16", "no token is left to supervise"),
        ("--rounds 0", "rounds must be at least 1, got 0"),
        ("--objectives [oprd,sft]", "unknown objectives sft; known: backbone"),
        ("--k 0", "k must lie between 1 and vocab"),
        ("--d 100 --heads 14", "d must be a multiple of 2 * heads"),
        ("--heads 14 --kv_heads 4", "heads (14) must be a multiple of kv_heads (4)"),
        ("--shards 8", "add --dry_run"),
        ("--student.path demo:student --layers 3", "leave one of them out"),
        ("--student.path /nowhere", "no model at '/nowhere'"),
        ("--teacher.path demo:teacher", "compares equal widths"),
        ("--batchs 2", "did you mean 'batch'?"),
        ("--batch 4096 --tokens 4096 --gradient_checkpointing off", "--gradient_checkpointing on"),
    ],
)
def test_wrong_flags(capsys, flags, message):
    assert message in fails(capsys, *flags.split())


def test_results_are_not_overwritten(capsys, tmp_path):
    (tmp_path / "gains.json").write_text("{}")
    message = fails(capsys, *TINY, "--output_dir", str(tmp_path))
    assert "gains.json exists and would be lost: choose another output_dir" in message


def test_a_directory_below_a_file_is_refused_before_anything_is_measured(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gains, "build_student", None)
    message = fails(capsys, *TINY, "--output_dir", str(tmp_path / "file" / "out"))
    assert f"{tmp_path / 'file'} is a file, not a directory" in message


def test_a_run_that_does_not_fit_is_refused():
    shape = Shape.of(model(32, 3, 4, 2, 48, 80, True).config)
    plan: GainsPlan = make_plan(GainsConfig(), shape, None, on_gpu=False)
    check_memory(plan, plan.total)
    check_memory(plan, None)
    with pytest.raises(ConfigError, match="are available: resident") as refused:
        check_memory(plan, plan.total - 1)
    assert PLANNER_OBJECTIVES[plan.worst[1]].title in str(refused.value)


def test_demo_pair_by_path(tmp_path):
    gains_cli.main(
        ["--student.path", "demo:student", "--teacher.path", "demo:teacher", "--tokens", "12",
         "--prompt", "4", "--rounds", "1", "--objectives", "[backbone]", "--device", "cpu",
         "--gradient_checkpointing", "off", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    written = json.loads((tmp_path / "out" / "gains.json").read_text())
    assert [row["objective"] for row in written["modes"]["off"]] == ["backbone", "oprd"]

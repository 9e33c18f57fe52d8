"""Sums of objectives on real architectures: the gradients of the parts, in one forward pass."""

import json
from dataclasses import replace

import pytest
import torch

from oprd.config import OBJECTIVES, DistillConfig, OpdConfig, check_values
from oprd.config.demo import demo_config
from oprd.data.collate import Batch
from oprd.distill.distiller import attach
from oprd.distill.objectives import REP, Objectives
from oprd.errors import ConfigError
from oprd.models.lm_head import copy_lm_head
from oprd.training.preflight import preflight
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import small_run
from tests.support.tiny import make_batch, make_model

OPD = [name for name in OBJECTIVES if name != REP]


def gradients(weights, architecture="qwen2", parts=((0, 3),), shared_ids=None, **opd):
    """Loss by objective and the gradient of their weighted sum, the batch in ``parts``."""
    student, teacher = (make_model(architecture, seed) for seed in (0, 1))
    d = DistillConfig(positions="last_k", k=3, shift="after")
    distillers = {}
    if REP in weights:
        distillers[""] = attach(
            student, teacher, kind=d.kind, positions=d.positions, k=d.k, shift=d.shift
        )
    shared = {} if shared_ids is None else {"": shared_ids}
    objectives = Objectives(
        weights, student, {"": teacher}, distillers, d, OpdConfig(k=4, **opd), shared_ids=shared
    )
    whole = make_batch()
    batches = [Batch(*(x[begin:end] for x in whole)) for begin, end in parts]
    chosen = [objectives.supervise(batch) for batch in batches]
    totals = {
        name: sum((c.rep if name == REP else c.opd).total for c in chosen) for name in weights
    }
    losses = dict.fromkeys(weights, 0.0)
    for batch, one in zip(batches, chosen, strict=True):
        out = objectives.student_pass(batch, one, objectives.teacher_pass(batch, one, ""), totals)
        out.loss.backward()
        for name, loss in out.parts.items():
            losses[name] += loss.item()
    flat = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return losses, torch.cat(flat)


@pytest.mark.parametrize("name", OPD)
@pytest.mark.parametrize("architecture", ["qwen2", "smollm", "gemma2"])
def test_chunked_and_materialised_train_alike(architecture, name):
    chunked = gradients({name: 1.0}, architecture, implementation="chunked", chunk_tokens=3)
    whole = gradients({name: 1.0}, architecture, implementation="materialised")
    assert chunked[0][name] == pytest.approx(whole[0][name], rel=1e-4, abs=1e-6)
    assert torch.allclose(chunked[1], whole[1], rtol=1e-3, atol=1e-6)
    assert whole[1].abs().max() > 1e-4


@pytest.mark.parametrize("implementation", ["chunked", "materialised"])
def test_a_sum_has_the_sum_of_the_gradients(implementation):
    options = {"implementation": implementation}
    both = gradients({"opd_top1": 0.5, REP: 3.0}, "smollm", **options)
    opd = gradients({"opd_top1": 0.5}, "smollm", **options)
    rep = gradients({REP: 3.0}, "smollm")
    assert both[0] == pytest.approx(opd[0] | rep[0], rel=1e-5)
    assert torch.allclose(both[1], opd[1] + rep[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "materialised"])
def test_distributions_are_compared_over_shared_ids(implementation):
    """As if both heads had those rows alone."""
    number = 30
    loss, _ = gradients({"opd_full": 1.0}, shared_ids=number, implementation=implementation)
    student, teacher = (make_model("qwen2", seed) for seed in (0, 1))
    ids, attention_mask, response_mask = make_batch()
    logits = [
        m(ids, attention_mask=attention_mask).logits[..., :number] for m in (student, teacher)
    ]
    log_p, log_q = (x.log_softmax(-1)[:, :-1][response_mask[:, 1:].bool()] for x in logits)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert loss["opd_full"] == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("weights", [{"opd_full": 1.0}, {"opd_topk": 1.0, REP: 2.0}], ids=str)
def test_micro_batches_equal_one_batch(weights):
    one = gradients(weights, "smollm")
    split = gradients(weights, "smollm", parts=((0, 1), (1, 3)))
    assert split[0] == pytest.approx(one[0], rel=1e-5)
    assert torch.allclose(split[1], one[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPD)
def test_output_space_objectives_train_the_demo(tmp_path, name):
    cfg = small_run(tmp_path / "run", objectives={name: 1.0}, opd__k=4, steps=2)
    train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "actor/grad_norm" in line]
    metric = "actor/pg_loss" if name == "opd_top1" else f"actor/{name}_loss"
    assert len(steps) == 2
    assert all(line[metric] != 0 and line["actor/grad_norm"] > 0 for line in steps)
    assert not any("rep/cosine_similarity" in line for line in steps)


def test_a_composite_logs_each_objective(tmp_path):
    cfg = small_run(tmp_path / "run", objectives={"opd_top1": 1.0, REP: 10.0}, steps=1)
    train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if "actor/grad_norm" in line]
    assert {"actor/pg_loss", "actor/rep_loss", "rep/cosine_similarity"} <= set(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": {}}, "objectives is empty"),
        ({"objectives": {"opd": 1.0}}, "'opd' is not one of"),
        ({"objectives": {"oprd": 0.0}}, "objectives.oprd must be above 0"),
        ({"objectives": {"opd_topk": 1.0}, "opd": OpdConfig(k=1)}, "opd.k must be at least 2"),
        ({"opd": OpdConfig(chunk_tokens=0)}, "opd.chunk_tokens must be at least 1"),
    ],
)
def test_mistakes_are_explained(change, message):
    with pytest.raises(ConfigError, match=message):
        check_values(replace(demo_config(), **change))


@pytest.mark.parametrize("name", ["opd_topk", "opd_topk_advantage", "opd_topk_raw"])
def test_more_tokens_than_there_are_is_refused_before_the_run(tmp_path, name):
    cfg = small_run(tmp_path / "run", objectives={name: 1.0}, steps=1, eval__sets={})
    assert cfg.opd.k == 16
    with pytest.raises(ConfigError, match=r"opd\.k=16, but .* vocabulary has, 15: set opd\.k"):
        preflight(cfg)
    cfg.opd.k = 15
    train(cfg)


def test_lm_head_is_copied_from_the_teacher():
    student, teacher = make_model("qwen2", 0), make_model("qwen2", 1)
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    copy_lm_head(teacher, student)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    with pytest.raises(ConfigError, match="tied to its embeddings"):
        copy_lm_head(teacher, make_model("smollm"))
    with pytest.raises(ConfigError, match="must be alike"):
        copy_lm_head(make_model("qwen2", vocab_size=48), student)

"""What is measured on a sample of positions, against the definitions."""

import json

import pytest
import torch

from oprd.distill.diagnostics import NAMES, Sample, evenly, measure, places
from oprd.models.lm_head import LMHead
from oprd.training.trainer import train
from tests.support.runs import small_run


def test_the_sample_is_spread():
    assert evenly(10, 4, "cpu").tolist() == [0, 2, 5, 7]
    assert evenly(3, 4, "cpu").tolist() == [0, 1, 2]
    assert evenly(0, 4, "cpu").tolist() == []


def test_places_count_within_responses():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1]]).bool()  # two in the second row
    tokens = torch.tensor([2, 5, 7, 8, 11])
    wanted = [0.125, 0.875, 0.25, 0.75, 0.5]
    torch.testing.assert_close(places(mask, tokens), torch.tensor(wanted))


@pytest.mark.parametrize("shared_ids", [None, 20])
def test_the_definitions(shared_ids):
    torch.manual_seed(0)
    s, t = torch.randn(100, 8), torch.randn(100, 8)
    heads = [LMHead(torch.randn(rows, 8)) for rows in (30, 40)]
    place = torch.linspace(0, 1, 100)
    found = measure(Sample(s, t, False, place), *heads, shared_ids, 0.7)
    assert tuple(found) == NAMES
    means = {name: total / count for name, (total, count) in found.items()}
    p = torch.distributions.Categorical(logits=s @ heads[0].weight.T / 0.7)
    q_logits = (t @ heads[1].weight.T)[:, :shared_ids] / 0.7
    q = torch.distributions.Categorical(logits=q_logits)
    assert means["actor/entropy"] == pytest.approx(p.entropy().mean().item(), rel=1e-5)
    assert means["teacher/entropy"] == pytest.approx(q.entropy().mean().item(), rel=1e-5)
    tops = [x.topk(16).indices.tolist() for x in (p.logits, q_logits)]
    overlap = sum(len(set(a) & set(b)) for a, b in zip(*tops, strict=True)) / 1600
    assert means["val-topk/overlap_ratio"] == pytest.approx(overlap, rel=1e-6)
    cosine = torch.cosine_similarity(s, t)
    assert means["rep/cosine_first"] == pytest.approx(cosine[:20].mean().item(), rel=1e-5)
    assert means["rep/cosine_last"] == pytest.approx(cosine[-20:].mean().item(), rel=1e-5)


def test_without_a_teachers_head_it_is_left_out():
    s = torch.randn(5, 8)
    found = measure(
        Sample(s, None, False, torch.zeros(5)), LMHead(torch.randn(30, 8)), None, None, 1
    )
    assert found["actor/entropy"][1] == 5
    assert all(found[name] == [0.0, 0.0] for name in NAMES[1:])


@pytest.mark.parametrize(
    "changes",
    [
        {"logging__teacher_head": True},
        {},
        {"objectives": {"opd_full": 1.0}},
        {"objectives": {"opd_full": 1.0}, "opd__implementation": "materialised"},
        {"teacher__path": "self:start", "data__train__teacher_prompt": "{prompt}{answer}"},
        {"packing": True},
    ],
)
def test_runs_measure_every_few_steps(tmp_path, changes):
    base = {"logging__diagnostics_every": 2, "logging__teacher_head": False}
    changes = base | {"data__max_teacher_prompt_tokens": 16} | changes
    train(small_run(tmp_path / "run", steps=3, eval__sets={}, eval__teacher=False, **changes))
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    first, second, third = (line for line in lines if "actor/grad_norm" in line)
    expected = set(NAMES)
    if "opd__implementation" in changes:  # without final states
        expected -= {n for n in NAMES if n.startswith("rep/")}
    elif "objectives" not in changes and not changes["logging__teacher_head"]:
        expected -= {"teacher/entropy", "val-topk/overlap_ratio"}  # the demo's head is not tied
    for step in (first, third):
        assert expected <= step.keys()
        assert all(-1 < step[name] < 3 for name in expected)
        assert not (set(NAMES) - expected) & step.keys()
        parts = [v for n, v in step.items() if n.startswith("actor/grad_norm/")]
        whole = step["actor/grad_norm"]
        assert sum(v**2 for v in parts) ** 0.5 == pytest.approx(whole, rel=1e-3)
        assert step["time/diagnostics_s"] > 0
    assert not expected & second.keys()
    if "objectives" not in changes:
        layers = second["rep/layer_cosine"]
        assert sum(layers) / len(layers) == pytest.approx(second["rep/cosine_similarity"], rel=1e-4)

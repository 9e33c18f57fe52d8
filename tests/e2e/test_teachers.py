"""Several teachers, a teacher that reads something else, and a student that teaches itself."""

import json
from dataclasses import replace

import pytest
import torch

from oprd.config import (
    DataConfig,
    DistillConfig,
    OpdConfig,
    PromptsConfig,
    TeacherConfig,
)
from oprd.config.demo import demo_config
from oprd.data.collate import collate
from oprd.data.prompts import load_prompts, load_training_prompts
from oprd.data.rollout import Rollout
from oprd.data.supervision import supervise
from oprd.demo.more import accuracy, carries, is_plain, make_more, with_hint, without_hint
from oprd.demo.task import Sum, make_splits, make_tokenizer
from oprd.distill.distiller import attach
from oprd.distill.objectives import REP, Objectives
from oprd.errors import ConfigError
from oprd.models.loading import load_config, load_model
from oprd.tokenizers.alignment import Reading
from oprd.training.preflight import preflight
from oprd.training.setup import Builder
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import lines, small_run
from tests.support.tiny import make_model

SHORT, LONG = [4, 5], [9, 8, 7, 4, 5]
ROLLOUTS = [
    Rollout(SHORT, [6, 3, 2], False, reading=Reading(LONG, [6, 3, 2])),
    Rollout([7], [5, 2], False, reading=Reading([3, 7], [5, 2])),
    Rollout([7, 9], [5], False),
]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_collate_pairs_states_that_have_read_the_same_response():
    batch = collate(ROLLOUTS, pad_id=0, device="cpu")
    read = batch.reading
    assert batch.input_ids.shape == (3, 5)
    assert read.input_ids.tolist()[0] == [*LONG, 6, 3, 2]
    assert batch.partner[0].tolist() == [-1, 4, 5, 6, 7]  # the last of the prompt predicts too
    assert batch.partner[1].tolist() == [8 + 1, 8 + 2, 8 + 3, -1, -1]
    assert batch.partner[2].tolist() == [-1, 16 + 1, 16 + 2, -1, -1]
    for shift in ("before", "after"):
        chosen = supervise(batch.response_mask, "all", shift=shift, partner_BT=batch.partner)
        ours = batch.input_ids.flatten()[chosen.rows]
        theirs = read.input_ids.flatten()[chosen.teacher_rows]
        assert chosen.total == 6
        if shift == "after":
            assert ours.tolist() == theirs.tolist() == [6, 3, 2, 5, 2, 5]


def test_unpaired_states_are_not_supervised():
    pairs = [(0, 1), (2, 2)]  # the student's second token ends where none of the teacher's does
    batch = collate([Rollout(SHORT, [6, 3, 2], False, reading=Reading([9], [6, 3, 2], pairs))],
                    pad_id=0, device="cpu")  # fmt: skip
    mask = batch.response_mask
    after = supervise(mask, "all", shift="after", partner_BT=batch.partner)
    assert (after.rows.tolist(), after.teacher_rows.tolist()) == ([2, 4], [2, 3])
    before = supervise(mask, "all", shift="before", partner_BT=batch.partner)
    # States that predict a token: of the first, the prompts' ends; of the second, the first pair.
    assert (before.rows.tolist(), before.teacher_rows.tolist()) == ([1, 2], [0, 2])
    weighed = supervise(mask, "all", reduction="seq-mean", partner_BT=batch.partner)
    assert weighed.weights.tolist() == [0.5, 0.5]
    assert weighed.total == 1


@pytest.mark.parametrize("implementation", ["chunked", "materialised"])
@pytest.mark.parametrize("name", [REP, "opd_full", "opd_top1"])
def test_gradients_against_each_teacher_on_its_own(name, implementation):
    """Batched with padding, two teachers, other prompts: as one rollout after another."""
    rollouts = [ROLLOUTS[0], ROLLOUTS[1]]
    weights, d = {name: 1.0}, DistillConfig(shift="after")
    opd = OpdConfig(implementation=implementation, chunk_tokens=2)

    def objectives(student, teachers):
        first, *rest = teachers
        distillers = {}
        if name == REP:
            distillers["0"] = attach(student, first, positions="all", shift="after")
        for i, other in enumerate(rest if name == REP else [], start=1):
            distillers[str(i)] = distillers["0"].with_teacher(other)
        models = {str(i): t for i, t in enumerate(teachers)}
        return Objectives(weights, student, models, distillers, d, opd)

    teachers = [make_model("qwen2", 1), make_model("qwen2", 2, num_hidden_layers=4)]
    student = make_model("qwen2", 0)
    both = objectives(student, teachers)
    total = 0.0
    for i, rollout in enumerate(rollouts):
        batch = collate([rollout, ROLLOUTS[2]], 0, "cpu")
        chosen = both.supervise(batch)
        out = both.student_pass(
            batch, chosen, both.teacher_pass(batch, chosen, str(i)), {name: 10.0}
        )
        out.loss.backward()
        total += out.loss.item()
    expected_loss, other = 0.0, make_model("qwen2", 0)
    for i, rollout in enumerate(rollouts):
        for one in (rollout, ROLLOUTS[2]):
            alone, batch = objectives(other, [teachers[i]]), collate([one], 0, "cpu")
            chosen = alone.supervise(batch)
            out = alone.student_pass(
                batch, chosen, alone.teacher_pass(batch, chosen, "0"), {name: 10.0}
            )
            out.loss.backward()
            expected_loss += out.loss.item()
            if name == REP:
                alone.distiller.detach()
    assert total == pytest.approx(expected_loss, rel=1e-5)
    for p, q in zip(student.parameters(), other.parameters(), strict=True):
        if q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [REP, "opd_full"])
def test_the_student_as_its_own_teacher_is_itself_told_more(name):
    student = make_model("qwen2", 0).train()
    twin = make_model("qwen2", 0)
    found = []
    for teacher in (student, twin):
        distillers = {"": attach(student, teacher, positions="all")} if name == REP else {}
        one = Objectives({name: 1.0}, student, {"": teacher}, distillers, DistillConfig(),
                         OpdConfig())  # fmt: skip
        batch = collate(ROLLOUTS[:2], 0, "cpu")
        chosen = one.supervise(batch)
        out = one.student_pass(batch, chosen, one.teacher_pass(batch, chosen, ""), {name: 5.0})
        assert student.training
        found.append(out.loss.item())
        if name == REP:
            distillers[""].detach()
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 1e-4


def test_privileged_prompts(tmp_path):
    tokenizer = make_tokenizer()
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+2=", "answer": "3", "more": {"hint": "9"}, "of": "x"},
        {"prompt": [{"role": "user", "content": "5+5="}], "answer": "01", "more": {"hint": "7"},
         "of": "y"},
    )  # fmt: skip
    source = PromptsConfig(path, teacher_prompt="{more.hint}{answer}={prompt}", source_field="of")
    cfg = DataConfig(chat_template="never", max_prompt_tokens=4, max_teacher_prompt_tokens=8)
    found = load_prompts(source, cfg, tokenizer).prompts
    assert [tokenizer.decode(p.teacher_ids) for p in found] == ["93=1+2=", "701=5+5="]
    assert [tokenizer.decode(p.token_ids) for p in found] == ["1+2=", "5+5="]
    assert [p.source for p in found] == ["x", "y"]
    cfg.max_teacher_prompt_tokens = 7
    assert load_prompts(source, cfg, tokenizer).dropped == 1
    cfg.overlong = "error"
    with pytest.raises(ConfigError, match=r"a.jsonl:2: the teacher's prompt has 8 tokens"):
        load_prompts(source, cfg, tokenizer)
    source.teacher_prompt = "{solution}{prompt}"
    with pytest.raises(ConfigError, match=r"a.jsonl:1: no field 'solution'"):
        load_prompts(source, cfg, tokenizer)


def test_sources_are_put_together(tmp_path):
    sets = {
        name: PromptsConfig(write(tmp_path / f"{name}.jsonl", *({"prompt": p} for p in prompts)))
        for name, prompts in {"a": ["1+1=", "1+2=", "1+1="], "b": ["2+2="]}.items()
    }
    found = load_training_prompts(DataConfig(sources=sets), make_tokenizer())
    assert [p.source for p in found.prompts] == ["a", "a", "b"]
    assert found.repeated == 1


def test_teachers_with_one_configuration_are_one_model():
    demo = TeacherConfig("demo:teacher")
    cfg = replace(demo_config(),
        teachers={
            "a": demo, "b": TeacherConfig("demo:teacher"), "c": TeacherConfig("self:current"),
            "d": TeacherConfig("self:start"),
        }
    )  # fmt: skip
    made = Builder(cfg, torch.device("cpu"))
    assert made.teachers["a"] is made.teachers["b"]
    assert made.teachers["c"] is made.student
    assert made.teachers["d"] is not made.student
    expected = load_model(TeacherConfig("demo:student")).lm_head.weight
    assert torch.equal(made.teachers["d"].lm_head.weight, expected)
    assert load_config("demo:student").hidden_size == 128


def two_sources(tmp_path, **teachers):
    sums = make_splits().train[:40]
    rows = [{"prompt": s.prompt, "answer": s.answer} for s in sums]
    sets = {
        "a": PromptsConfig(write(tmp_path / "a.jsonl", *rows[:20])),
        "b": PromptsConfig(write(tmp_path / "b.jsonl", *rows[20:])),
    }
    cfg = small_run(tmp_path / "run", teachers={n: TeacherConfig(p) for n, p in teachers.items()})
    cfg.data.sources = sets
    return cfg


def test_two_teachers_train(tmp_path):
    cfg = two_sources(tmp_path, a="demo:teacher", b="demo:student")
    summary = train(cfg)
    assert set(summary.evaluations) == {"teacher a", "teacher b", "student before", "student after"}
    steps = [line for line in lines(summary.directory) if "actor/rep_loss" in line]
    # Prompts of b are compared with the weights the student begins with; those of a are not.
    assert steps[0]["actor/rep_loss"] > 0.01
    assert steps[0]["rep/supervised_tokens"] > 8


@pytest.mark.parametrize("path", ["self:start", "self:current"])
@pytest.mark.parametrize("objective", [REP, "opd_full"])
def test_a_student_learns_from_itself(tmp_path, path, objective):
    cfg = small_run(tmp_path / "run", teacher=TeacherConfig(path), objectives={objective: 1.0})
    cfg.data.train.teacher_prompt = "{answer}={prompt}"
    cfg.data.max_teacher_prompt_tokens = 13
    cfg.eval.sets["val"].teacher_prompt = "{answer}={prompt}"
    summary = train(cfg)
    steps = [line for line in lines(summary.directory) if "actor/grad_norm" in line]
    assert all(line["actor/grad_norm"] > 0 for line in steps)
    before, teacher = (summary.evaluations[who]["val"] for who in ("student before", "teacher"))
    assert before != teacher  # it was asked with the answer


def refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        preflight(cfg)


@pytest.mark.slow
def test_mistakes_are_explained(tmp_path):
    refused(two_sources(tmp_path, a="demo:teacher"), "no teacher for the prompts of b")
    extra = two_sources(tmp_path, a="demo:teacher", b="demo:teacher", c="demo:teacher")
    refused(extra, "no prompts for the teacher of c: their sources are a, b")
    same = two_sources(tmp_path, a="demo:teacher", b="self:start")
    refused(same, r"reads the same prompts \(b\): it has nothing to teach")
    alone = small_run(tmp_path / "x", teacher=TeacherConfig("self:current"))
    refused(alone, "nothing to teach")
    both = two_sources(tmp_path, a="demo:teacher", b="demo:teacher")
    both.teacher = TeacherConfig("demo:student")
    both.data.train = PromptsConfig("demo:val.jsonl")
    refused(both, "both teacher and teachers are given")
    refused(both, "both data.train and data.sources are given")
    both.distill = DistillConfig(init_head_from_teacher=True)
    refused(both, "init_head_from_teacher needs one teacher")
    wide = small_run(tmp_path / "y")
    wide.data.train.teacher_prompt = "{answer}={prompt}"
    wide.data.max_teacher_prompt_tokens = 60
    refused(wide, "60 prompt tokens and 5 new ones exceed the 64 positions of the teacher")


@pytest.mark.slow
def test_the_demos_models_and_prompts(tmp_path):
    make_more(tmp_path, specialist_steps=3, hint_steps=3, num_train=20, num_test=30)
    tokenizer = make_tokenizer()
    for name, belongs in {"carry": carries, "plain": is_plain, "hinted": lambda _: True}.items():
        files = [tmp_path / f"{name}.jsonl", tmp_path / f"{name}_test.jsonl"]
        rows = [[json.loads(line) for line in f.read_text().splitlines()] for f in files]
        assert [len(r) for r in rows] == [20, 30]
        sums = [Sum(*map(int, r["prompt"].rstrip("=").split("+"))) for r in rows[0] + rows[1]]
        assert all(map(belongs, sums))
        assert not {r["prompt"] for r in rows[0]} & {r["prompt"] for r in rows[1]}
        model = load_model(TeacherConfig(str(tmp_path / name)))
        assert 0 <= accuracy(model, tokenizer, sums, without_hint) <= 1
    assert with_hint(Sum(483, 219)) == "207=483+219="

"""Making the models of ``oprd-paper``."""

import json
import random

import pytest
import torch

from oprd.data.rollout import Rollout
from oprd.models.loading import load_tokenizer
from oprd.paper import make as make_module
from oprd.paper.command import SHIPPED
from oprd.paper.learn import encode, learn, make_model, respond
from oprd.paper.make import MADE, is_made, make, rising_and_falling, shortest_right, worked
from oprd.paper.task import Problem, make_splits, make_tokenizer

SPLITS, TOKENIZER = make_splits(), make_tokenizer()


def test_labels_are_the_response_and_its_end():
    problem = Problem(583, 219)
    text = problem.response(random.Random(0))
    part, eos = text[: text.index(",")], TOKENIZER.eos_token
    ids, labels = encode([problem.prompt] * 2, [text, part], TOKENIZER)
    assert TOKENIZER.decode(ids[0]) == problem.prompt + text + eos
    assert TOKENIZER.decode(labels[0][labels[0] != -100]) == text + eos
    assert TOKENIZER.decode(labels[1][labels[1] != -100]) == part + eos


def test_supervised_training_lowers_the_loss():
    torch.manual_seed(0)
    model, losses = make_model(TOKENIZER, 32, 1), []
    schedule = rising_and_falling(12, 3e-3, 2)
    learn(model, TOKENIZER, worked(SPLITS, 0), schedule, lambda _, loss: losses.append(loss))
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1


def test_the_learning_rate_rises_and_falls():
    rate = rising_and_falling(10, 1.0, 2)
    assert [rate(1), rate(2), rate(10)] == pytest.approx([0.5, 1.0, 1 / 9])
    assert rate(11) is None


def test_rejection_sampling_keeps_the_shortest_right_response(monkeypatch):
    turns = iter([("long", 9, True), ("wrong", 1, False), ("short", 5, True), ("longer", 7, True)])

    def respond(model, tokenizer, problems):
        text, length, right = next(turns)
        rollout = Rollout([0], [1] * length, False)
        return [(rollout, text, right), *[(rollout, text, False)] * (len(problems) - 1)]

    monkeypatch.setattr(make_module, "respond", respond)
    chosen = shortest_right(None, TOKENIZER, SPLITS, seed=0, problems=3, responses=4)
    assert [text for _, text in chosen] == ["short"]


def test_a_model_that_is_there_is_kept(tmp_path, monkeypatch):
    name = "teacher_of_other_shape"
    (tmp_path / name).mkdir()
    (tmp_path / name / MADE).write_text("{}")
    monkeypatch.setattr(make_module, "learn", None)  # would fail
    make(tmp_path, [name])
    assert is_made(tmp_path / name)


def test_the_models_of_the_package_are_small_and_what_their_record_says():
    """The record is of temperature 1 on the validation problems, by the code that made them."""
    files = [f for f in SHIPPED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 10e6
    for name, low, high in (("student", 0.15, 0.4), ("teacher", 0.95, 1.0)):
        assert low <= json.loads((SHIPPED / name / MADE).read_text())["accuracy"] <= high
        assert load_tokenizer(str(SHIPPED / name)).get_vocab() == TOKENIZER.get_vocab()


def test_the_teacher_answers_right_and_the_student_often_does_not():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    right = {}
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(SHIPPED / name, dtype=torch.float32)
        answers = respond(model, TOKENIZER, SPLITS.val[:24])
        right[name] = sum(ok for *_, ok in answers) / len(answers)
    assert right["teacher"] >= 0.85
    assert right["student"] <= 0.6

"""A teacher in float8: refused with the fix, measured, and what of it runs without a GPU."""

import importlib.util

import pytest
import torch
from torch import nn

from oprd.benchmark.report import PAPER_SHAPE
from oprd.config import TeacherConfig, check_values
from oprd.config.demo import demo_config
from oprd.data.prompts import Prompt
from oprd.errors import ConfigError, Unreachable
from oprd.memory_plan.run import make_training_plan
from oprd.models import float8
from oprd.models.float8 import Distance, States, check_float8, describe, float8_problem
from oprd.observability.memory import GIB
from oprd.training import setup
from oprd.training.float8_error import measured_float8
from oprd.training.preflight import preflight
from oprd.training.trainer import train
from tests.support.logs import listen
from tests.support.runs import small_run
from tests.support.tiny import make_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROMPTS = [Prompt([3, 4, 5, 6, 7], None), Prompt([8, 9, 10], None)]


def test_what_is_missing_is_said_with_the_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unreachable, match=r"teacher.fp8=true .*pip install torchao"):
        check_float8("teacher", "bfloat16", GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert "needs a GPU" in float8_problem(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert "compute capability 8.9 (Ada, Hopper), and this one has 8.6" in float8_problem(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_float8("teacher", "bfloat16", GPU)
    with pytest.raises(ConfigError, match=r"rounds bfloat16 weights, and teacher.dtype is float32"):
        check_float8("teacher", "float32", GPU)


def test_a_run_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    cfg = small_run(tmp_path / "run", teacher=TeacherConfig("demo:teacher", fp8=True))
    with pytest.raises(Unreachable, match=r"teacher.fp8=true can't be used"):
        preflight(cfg)
    cfg.fsdp.mode = "always"
    with pytest.raises(ConfigError, match=r"fsdp.teacher=sharded: float8 weights are not sharded"):
        preflight(cfg)
    cfg.teacher.path = "self:current"
    with pytest.raises(ConfigError, match="is the student itself, which has no compile, liger"):
        check_values(cfg)


@pytest.fixture
def rounded(monkeypatch):
    """In place of torchao: weights rounded with one scale a row, inputs as they are."""

    def round_(model):
        for module in float8.find_decoder(model).layers.modules():
            if isinstance(module, nn.Linear):
                scale = module.weight.detach().abs().amax(1, keepdim=True) / 448
                narrow = (module.weight.detach() / scale).to(torch.float8_e4m3fn)
                module.weight.data = (narrow.to(scale.dtype) * scale).to(module.weight.dtype)

    monkeypatch.setattr("oprd.training.float8_error.to_float8", round_)


def test_the_error_is_measured_on_prompts(rounded):
    student, teacher = (make_model("qwen2", seed).eval() for seed in (0, 1))
    pairs, ids = [(0, 0), (2, 2)], [p.token_ids for p in PROMPTS]
    before = States.of(teacher, ids, [0, 2])
    own = [teacher(torch.tensor([i]), output_hidden_states=True).hidden_states[1][0] for i in ids]
    assert torch.equal(before.by_block[0], torch.cat(own))
    assert before.by_block[2].shape == (8, 32)
    line, *notes = measured_float8(student, teacher, PROMPTS, pairs)
    error = Distance.between(States.of(teacher, ids, [0, 2]), before, pairs)
    a, b = States.of(teacher, ids, [2]).by_block[2], before.by_block[2]
    assert error.relative[1] == pytest.approx(((a - b).norm() / b.norm()).item())
    assert 1e-3 < error.relative[0] < 0.1
    assert f"{error.mean:.2%}" in line
    assert f"at most {max(error.relative):.2%}" in line
    to_student = Distance.between(States.of(student, ids, [0, 2]), before, pairs)
    assert f"the student is {to_student.mean:.2%} away" in line
    assert to_student.mean > 0.5  # other random weights
    assert not notes


def test_an_error_that_is_large_for_the_student_is_noted(rounded):
    student, teacher = make_model("qwen2").eval(), make_model("qwen2").eval()
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    line, note = measured_float8(student, teacher, PROMPTS, [(2, 2)])
    assert "away" in line
    assert "of the distance that is to be closed" in note
    for alone in (None, Distance([0.0], [0.0])):  # not known; self:start
        assert len(describe(Distance([0.01], [1e-4]), alone)) == 1


def test_a_run_logs_it(rounded, tmp_path, monkeypatch):
    monkeypatch.setattr("oprd.models.fast_parts.check_float8", lambda *_: None)
    cfg = small_run(tmp_path / "run", steps=1, teacher=TeacherConfig("demo:teacher", fp8=True))
    messages = listen(setup)
    train(cfg)
    assert sum("teacher in float8: its states are off by" in m for m in messages) == 1


def test_the_plan_counts_a_byte_a_weight():
    sizes = []
    for fp8 in (False, True):
        cfg = demo_config()
        cfg.teacher = TeacherConfig("demo:teacher", "bfloat16", fp8=fp8)
        cfg.student.dtype = "bfloat16"
        plan = make_training_plan(cfg, PAPER_SHAPE, {"": PAPER_SHAPE}, 1, 80 * GIB)
        sizes.append(plan.resident["teacher's weights"])
    assert sizes[0] - sizes[1] == PAPER_SHAPE.layers * PAPER_SHAPE.block_parameters


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_rounds_the_blocks_and_nothing_else(monkeypatch):
    """Only weights: rounding inputs needs a GPU."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
    )

    if not torch.cuda.is_available():
        monkeypatch.setattr(float8, "_recipe", Float8WeightOnlyConfig)
    else:
        assert isinstance(float8._recipe(), Float8DynamicActivationFloat8WeightConfig)
    device = GPU if torch.cuda.is_available() else CPU
    model = make_model("qwen2", 1, hidden_size=64, intermediate_size=96)
    model.to(device, torch.bfloat16).eval()
    line, *_ = measured_float8(None, model, PROMPTS, [(0, 0), (2, 2)])
    assert type(model.lm_head.weight) is nn.Parameter
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert all(type(w).__name__ == "Float8Tensor" for w in weights)
    assert not any(p.requires_grad for p in model.parameters())
    assert 0.001 < float(line.split("off by ")[1].split("%")[0]) / 100 < 0.2

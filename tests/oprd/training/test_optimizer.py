"""The learning rate, and what else of a step depends on the configuration alone."""

from dataclasses import replace

import pytest
import torch

from benchmarks.small_models import make, small_config
from oprd.checkpoint import state
from oprd.checkpoint.writer import Writer
from oprd.config import OptimConfig, check_values
from oprd.config.demo import demo_config
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError
from oprd.models.loading import switch_off_dropout
from oprd.training.optimizer import can_fuse, fast_forward, lr_factor, make_optimizer
from oprd.training.rounding import StochasticAdamW
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import steps_of
from tests.support.runs import small_run
from tests.support.tiny import make_batch, make_model


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_begins_above_0(schedule):
    cfg = OptimConfig(warmup_ratio=0.4, schedule=schedule)
    rates = [lr_factor(cfg, step, 10) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    if schedule == "constant":
        assert rates[5:] == [1.0] * 6
    else:
        assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
        assert 0 < rates[9] < 0.1
        assert rates[10] == 0
    assert lr_factor(OptimConfig(warmup_ratio=1.0), 0, 1) == 1


def test_a_resumed_schedule_is_where_it_was():
    model = torch.nn.Linear(2, 2)
    cfg = OptimConfig(lr=1e-2, warmup_ratio=0.2)
    _, scheduler = make_optimizer(model, cfg, 10)
    fast_forward(scheduler, 4)
    assert scheduler.get_last_lr() == [1e-2 * lr_factor(cfg, 4, 10)]


@pytest.mark.parametrize("first", [False, True])
def test_fused_and_unfused_updates_are_equal_and_read_each_others_state(tmp_path, first):
    """Three steps with one, three with the other after a checkpoint, and six with neither."""

    def make(fused):
        model = make_model("qwen2")
        optimizer, _ = make_optimizer(model, OptimConfig(lr=1e-2, fused=fused), 10)
        assert optimizer.param_groups[0]["fused"] is fused
        return model, optimizer

    def steps(model, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole = make(False)
    steps(*whole, range(6))
    model, optimizer = make(first)
    steps(model, optimizer, range(3))
    writer = Writer(
        tmp_path, torch.device("cpu"), asynchronous=False, keep_last=1, model_files={"a": b"b"}
    )
    tensors = state.model_tensors(model) | state.optimizer_tensors(model, optimizer)
    writer.write(tensors, {"step": 3, "best": None})
    path = writer.wait()
    other, other_optimizer = make(not first)
    state.load(path, other, other_optimizer)
    assert other_optimizer.param_groups[0]["fused"] is not first
    steps(other, other_optimizer, range(3, 6))
    for a, b in zip(other.parameters(), whole[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_fused_is_not():
    assert can_fuse(make_model("qwen2").parameters())
    assert not can_fuse([torch.nn.Parameter(torch.empty(2, device="meta"))])
    cfg = OptimConfig(rounding="stochastic")
    optimizer, _ = make_optimizer(make_model("qwen2").to(torch.bfloat16), cfg, 10)
    assert isinstance(optimizer, StochasticAdamW)


def test_the_rate_that_was_used_is_logged(tmp_path):
    train(small_run(tmp_path / "run", steps=1, optim__lr=1e-3, optim__warmup_ratio=1.0))
    metrics = steps_of(tmp_path / "run")[0]
    assert metrics["actor/lr"] == 1e-3


def test_dropout_is_off():
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    ids = make_batch()[0]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.resid_pdrop == 0.5  # as it is saved
    other = make_model("llama", attention_dropout=0.5).train()
    assert not torch.equal(other(ids).logits, other(ids).logits)
    switch_off_dropout(other)
    assert torch.equal(other(ids).logits, other(ids).logits)


def test_inputs_of_experts_get_no_noise():
    model = make(small_config("mixtral"))
    ids = torch.arange(3, 12)[None]
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.1
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert not torch.equal(model.train()(input_ids=ids).logits, expected)
        switch_off_dropout(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("dropout", [False, True])
def test_identical_models_have_nothing_to_learn(tmp_path, dropout):
    """Of a model with dropout the update sees what the teacher sees."""
    make_model("gpt2", vocab_size=15, resid_pdrop=0.5).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    cfg = small_run(
        tmp_path / "run", steps=1, student__path=path, teacher__path=path, student__dropout=dropout
    )
    train(cfg)
    metrics = steps_of(tmp_path / "run")[0]
    assert (metrics["actor/rep_loss"] < 1e-10) == (not dropout)


def test_what_can_not_be_trained_is_refused():
    cfg = demo_config()
    cfg.student.dtype = "float16"
    with pytest.raises(ConfigError, match=r"float16 can't be trained: AdamW's epsilon"):
        check_values(cfg)
    cfg = replace(demo_config(), objectives={"opd_top1": 1.0})
    cfg.rollout.top_p = 0.9
    with pytest.raises(ConfigError, match=r"top_p=0\.9 with opd_top1, whose tokens must be drawn"):
        check_values(cfg)

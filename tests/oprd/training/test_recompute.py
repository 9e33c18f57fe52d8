"""``student.gradient_checkpointing=auto``: as few blocks as fit, and more where the plan erred."""

import pytest
import torch
from transformers import AutoTokenizer

from oprd.data.rollout import Rollout
from oprd.distill.objectives import Objectives
from oprd.errors import ConfigError
from oprd.models import recompute as model_recompute
from oprd.models.loading import DEMO
from oprd.observability.console import shown
from oprd.observability.memory import GIB
from oprd.training import recompute
from oprd.training.preflight import preflight
from oprd.training.recompute import choose_blocks, is_out_of_memory
from oprd.training.trainer import Trainer, train
from tests.oprd.benchmark.test_gains import model
from tests.support.logs import listen
from tests.support.plan_on_ranks import BLOCKS, PROMPT, RESPONSE, held
from tests.support.runs import lines, small_run
from tests.support.tiny import make_model

CPU = torch.device("cpu")
LENGTH = PROMPT + RESPONSE


def sized_run(path, directory, **changes):
    """A run of whose memory activations are the most."""
    cfg = small_run(
        directory, eval__sets={}, student__path=str(path), teacher__path=str(path),
        micro_batch_tokens=8 * LENGTH, **changes,
    )  # fmt: skip
    cfg.data.max_prompt_tokens = cfg.data.max_teacher_prompt_tokens = PROMPT
    cfg.rollout.max_new_tokens, cfg.rollout.batch_size = RESPONSE, 2
    cfg.eval.teacher = False
    return cfg


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model(**BLOCKS, tied=True).save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO / "student").save_pretrained(path)
    return path


def chosen(cfg, memory, monkeypatch):
    monkeypatch.setattr(recompute, "available_bytes", lambda _device: memory)
    return choose_blocks(cfg, CPU, {})


def test_as_few_as_fit(saved, tmp_path, monkeypatch):
    cfg = sized_run(saved, tmp_path / "run", student__gradient_checkpointing="auto")
    preflight(cfg)
    found = [chosen(cfg, int(memory * GIB), monkeypatch)[0] for memory in (16, 0.32, 0.25, 0.01)]
    assert (found[0], found[-1]) == (0, 4)
    assert found == sorted(found)
    assert 0 < found[1] < 4
    number, (note,) = chosen(cfg, 16 * GIB, monkeypatch)
    assert "0 of 4 blocks are recomputed" in note
    assert "of 16.0 GiB" in note
    number, (note,) = chosen(cfg, None, monkeypatch)
    assert number is True
    assert "not known" in note
    cfg.student.gradient_checkpointing = 3
    assert chosen(cfg, 16 * GIB, monkeypatch) == (3, [])


def test_more_blocks_than_there_are_is_said():
    said = listen(model_recompute)
    with shown():
        assert model_recompute.recompute_blocks(make_model("llama"), 99) == 3
        assert model_recompute.recompute_blocks(make_model("llama"), 3) == 3
    (note,) = said
    assert "=99, but LlamaForCausalLM has 3 blocks: all are recomputed" in note


def test_what_the_planner_does_not_know_is_recomputed_whole(saved, tmp_path, monkeypatch):
    def unknown(*_):
        raise ConfigError("x: the planner does not know rwkv")

    monkeypatch.setattr(recompute, "shapes", unknown)
    cfg = sized_run(saved, tmp_path / "run", student__gradient_checkpointing="auto")
    preflight(cfg)
    number, (note,) = chosen(cfg, 16 * GIB, monkeypatch)
    assert number is True
    assert "does not know rwkv" in note


def held_by(cfg):
    """The bytes of tensors that a step holds at most, and the number of blocks recomputed."""
    trainer = Trainer(cfg, preflight(cfg))
    trainer._load()
    ids = [3 + i % 10 for i in range(RESPONSE)]
    resident, peak = held(trainer, [Rollout(ids[:PROMPT], ids[i:], True) for i in range(8)])
    trainer.log.close()
    return resident + peak, trainer.update.recomputed


def test_a_run_fits_a_limit_that_it_does_not_fit_without(saved, tmp_path, monkeypatch):
    without, none = held_by(sized_run(saved, tmp_path / "without"))
    limit = int(0.98 * without)
    monkeypatch.setattr(recompute, "available_bytes", lambda _device: limit)
    auto = sized_run(saved, tmp_path / "auto", student__gradient_checkpointing="auto")
    peak, some = held_by(auto)
    assert none == 0 < some < 4
    assert peak < limit


def test_a_failed_allocation_recomputes_more(tmp_path, monkeypatch):
    whole = train(small_run(tmp_path / "whole"))
    plain, attempts = Objectives.student_pass, []

    def failing(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        attempts.append(any(layer.gradient_checkpointing for layer in self.decoder.layers))
        if len(attempts) == 2:  # gradients of the first micro-batch are there already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return out

    monkeypatch.setattr(Objectives, "student_pass", failing)
    options = {"micro_batch_tokens": 64, "student__gradient_checkpointing": "auto"}
    again = train(small_run(tmp_path / "again", **options))
    assert attempts[:2] == [False, False]
    assert all(attempts[2:])
    for a, b in zip(lines(whole.directory), lines(again.directory), strict=True):
        if "actor/rep_loss" in a:
            assert a["actor/rep_loss"] == pytest.approx(b["actor/rep_loss"], rel=1e-4)
            assert a["actor/grad_norm"] == pytest.approx(b["actor/grad_norm"], rel=1e-4)


def test_without_auto_or_with_another_error_it_stops(tmp_path, monkeypatch):
    def failing(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Objectives, "student_pass", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(small_run(tmp_path / "a"))
    with pytest.raises(torch.OutOfMemoryError):  # all are recomputed, and still
        train(small_run(tmp_path / "b", student__gradient_checkpointing="auto"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))

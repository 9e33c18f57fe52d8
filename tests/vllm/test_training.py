"""Runs of ``oprd-train`` with vLLM, and its end by force."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oprd.checkpoint.resume import locate
from oprd.config import EvalSetConfig, SamplingParams, TrainConfig
from oprd.config.demo import demo_config
from oprd.engines import factory
from oprd.engines.logprob_gap import logprob_gap
from oprd.engines.vllm import engine as vllm_engine
from oprd.engines.vllm.preflight import check_vllm
from oprd.errors import ConfigError
from oprd.training.trainer import TrainingStopped, train
from tests.support.logs import listen
from tests.support.tiny import make_model
from tests.vllm.conftest import start_engine

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


def small_run(directory) -> TrainConfig:
    cfg = replace(demo_config(), output_dir=str(directory), steps=4, log_every=1)
    cfg.rollout.prompts_per_step = 8
    cfg.rollout.engine = "vllm"
    cfg.eval.sets = {"val": EvalSetConfig("demo:val.jsonl", limit=40)}
    return cfg


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_run_ends_where_the_engine_is_stale(tmp_path, monkeypatch, capsys, ahead):
    """Two updates reach it, later ones do not. With rollout.staleness 1 too, where responses of
    older weights are not compared."""
    real, first = factory.full_weights, {}
    calls = []

    def stale(student):
        calls.append(1)
        if len(calls) > 2:
            yield from first.items()
            return
        for name, tensor in real(student):
            first[name] = tensor.clone()
            yield name, tensor

    monkeypatch.setattr(factory, "full_weights", stale)
    cfg = small_run(tmp_path / "run")
    cfg.rollout.staleness = ahead
    cfg.optim.lr, cfg.optim.schedule, cfg.optim.warmup_ratio = 5e-3, "constant", 0.0
    with pytest.raises(TrainingStopped) as caught:
        train(cfg)
    message = str(caught.value)
    assert "step 3: the vLLM engine samples from other probabilities" in message
    assert "are not those of step 2" in message
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert str(saved) in message
    assert [c.step for c in locate(saved)[0]] == [2]
    steps = [line for line in lines(tmp_path / "run") if "actor/rep_loss" in line]
    assert [s["rollout/policy_version"] for s in steps] == [0, 1 - ahead]
    assert all(s["rollout/logprob_gap"] <= s["rollout/logprob_gap_max"] < 1e-4 for s in steps)
    assert "student before: val" in capsys.readouterr().out  # sampled by the engine


@pytest.mark.exhaustive
def test_it_samples_the_next_step_while_this_one_updates_the_student(tmp_path):
    cfg = small_run(tmp_path / "run")
    cfg.steps, cfg.rollout.staleness, cfg.eval.sets = 3, 1, {}
    cfg.optim.lr, cfg.optim.schedule, cfg.optim.warmup_ratio = 5e-3, "constant", 0.0
    train(cfg)
    steps = lines(tmp_path / "run")
    assert [s["rollout/policy_version"] for s in steps] == [0, 0, 1]
    assert [s["rollout/staleness"] for s in steps] == [0, 1, 1]
    assert all(s["rollout/logprob_gap_max"] < 1e-4 for s in steps)


@pytest.mark.exhaustive
def test_a_killed_engine_comes_back_with_the_present_weights(tmp_path):
    """Of a model whose head is tied to its embeddings."""
    sizes = {"hidden_size": 128, "intermediate_size": 96}
    model = make_model("smollm", vocab_size=15, eos_token_id=1, **sizes).eval()
    said = listen(vllm_engine)
    engine = start_engine(model, tmp_path, gap_responses=100)
    asked = SamplingParams(max_new_tokens=9, temperature=1.0)
    try:
        engine.sync(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        engine.sync(1)
        before = engine.sample([[5, 3, 6]] * 20, asked, seed=3)
        os.kill(engine.pid, signal.SIGKILL)
        after = engine.sample([[5, 3, 6]] * 20, asked, seed=3)
    finally:
        engine.close()
    assert [r.response_ids for r in after] == [r.response_ids for r in before]
    assert len(said) == 1
    assert "SIGKILL" in said[0]
    for rollouts in (before, after):
        found = logprob_gap(
            model, rollouts, last=9, max_tokens=10**6, pad_id=0, device=torch.device("cpu")
        )
        assert found.max < 1e-4


@pytest.mark.exhaustive
def test_two_ranks_share_one_copy_of_the_student(tmp_path):
    """Tensor parallel. Each has prompts of its own, and samples for both."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "oprd.cli.train",
         f"--output_dir={tmp_path / 'run'}", "--steps=3", "--eval.sets={}",
         "--rollout.prompts_per_step=6", "--rollout.engine=vllm",
         "--rollout.vllm.tensor_parallel_size=2"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = lines(tmp_path / "run")
    assert [s["rollout/policy_version"] for s in steps] == [0, 1, 2]
    assert all(s["rollout/logprob_gap_max"] < 1e-4 for s in steps)
    for rank in range(2):
        log = (tmp_path / "run" / "vllm" / f"rank_{rank}" / "engine.log").read_text()
        assert f"world_size=2 rank={rank}" in log


def test_vllm_is_asked_before_weights_are_loaded(tmp_path):
    config = make_model("qwen2").config
    config.architectures = ["NoSuchForCausalLM"]
    with pytest.raises(ConfigError, match=r"vLLM can't run demo:student: .*NoSuchForCausalLM"):
        check_vllm(small_run(tmp_path), config, torch.device("cpu"))

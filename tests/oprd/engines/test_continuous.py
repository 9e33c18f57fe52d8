"""Continuous batching: what `generate` samples, without a pass for a row that has ended."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from benchmarks.small_models import make, small_config
from oprd import distributed
from oprd.config import FsdpConfig, LoraConfig, SamplingParams
from oprd.config.demo import demo_config
from oprd.demo.task import make_tokenizer
from oprd.distributed.fsdp import make_mesh, shard
from oprd.engines import factory
from oprd.engines.cached_rows import check_continuous, why_not
from oprd.engines.continuous import ContinuousEngine, sample
from oprd.engines.factory import engine_on
from oprd.engines.generate import GenerateEngine, eos_ids, generate
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.run import evaluate_models
from oprd.models.decoder import find_decoder
from oprd.models.lora import add_adapter
from oprd.training.evaluator import Evaluator
from oprd.training.preflight import preflight
from oprd.training.trainer import train
from tests.support.runs import measured, small_run
from tests.support.tiny import make_model

ROOT = Path(__file__).parents[3]
TOKENIZER = make_tokenizer()
ENDS = [2, 7, 9, 11, 13, 17]
GREEDY = SamplingParams(20, temperature=0.0)


def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 3, 9, 4, 7, 6, 2, 9, 11)
    return [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]


def ending(model):
    """The model with several EOS tokens, which it meets early and late."""
    model.generation_config.eos_token_id = ENDS
    return model


@pytest.fixture
def llama():
    return ending(make_model("llama"))


SLOW = {"mamba2", "falcon_h1", "deepseek_v3", "qwen3_moe", "biogpt"}
FAMILIES = [  # A sliding window; a window, soft caps; states of a recurrence, and beside attention
    # in a block; chunks; low-rank keys; learned positions; ALiBi; experts.
    *("llama", "gemma3_text", "gemma2", "qwen3_next", "mamba2", "falcon_h1", "llama4_text"),
    *("deepseek_v3", "biogpt", "bloom", "qwen3_moe"),
]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in FAMILIES]
)
def test_greedy_responses_are_those_of_generate(kind):
    model = ending(make(small_config(kind)))
    alone = [generate(model, TOKENIZER, [p], GREEDY)[0] for p in prompts()]
    for places in (4, None):
        assert sample(model, TOKENIZER, prompts(), GREEDY, places) == alone
    assert len({len(r.response_ids) for r in alone}) > 1


@pytest.mark.parametrize("places", [1, 4, None])
def test_no_token_goes_through_the_model_in_vain(llama, places):
    passed = []
    llama.register_forward_pre_hook(
        lambda _, args, given: passed.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = sample(llama, TOKENIZER, prompts(), GREEDY, places)
    lengths = [len(r.response_ids) for r in found]
    assert sum(rows for rows, tokens in passed if tokens == 1) == sum(lengths) - len(lengths)
    read = [(rows, tokens) for rows, tokens in passed if tokens > 1]
    assert sum(rows for rows, _ in read) == len(lengths)  # the first token comes with the prompt
    assert max(rows for rows, _ in passed) == (places or len(lengths))
    if places == 1:
        assert sorted(t for _, t in read) == sorted(len(p) for p in prompts())
    if places is None:
        assert len(passed) == max(lengths)
    passed.clear()
    generate(llama, TOKENIZER, prompts(), GREEDY, places)
    spent = sum(rows for rows, tokens in passed if tokens == 1)
    assert spent == sum(lengths) - len(lengths) or places != 1
    assert places == 1 or spent > sum(lengths)  # what `generate` wastes


@pytest.mark.parametrize("sampling", [SamplingParams(2, 0.7), SamplingParams(2, 1.0, 0.8)])
def test_samples_have_the_models_probabilities(llama, sampling):
    """The first two tokens of 10,000 responses, by a chi-square test."""
    drawn, prompt = 10_000, [5, 3, 6]
    rollouts = ContinuousEngine(llama, TOKENIZER, 1000).sample([prompt] * drawn, sampling, seed=0)
    found = Counter(tuple(r.response_ids) for r in rollouts)

    def probabilities(ids):
        with torch.no_grad():
            p = (llama.eval()(torch.tensor([ids])).logits[0, -1] / sampling.temperature).softmax(-1)
        ordered, order = p.double().sort(descending=True)
        if sampling.top_p < 1:
            ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0  # the nucleus
        return torch.zeros_like(ordered).scatter_(0, order, ordered / ordered.sum())

    expected = {}
    for first, p in enumerate(probabilities(prompt).tolist()):
        if first in eos_ids(llama, TOKENIZER):
            expected[(first,)] = p
        elif p:
            after = probabilities([*prompt, first]).tolist()
            expected |= {(first, second): p * q for second, q in enumerate(after)}
    assert all(expected[pair] > 0 for pair in found)
    common = {pair: p * drawn for pair, p in expected.items() if p * drawn >= 5}
    rest = drawn - sum(common.values())
    cells = [(found[pair], e) for pair, e in common.items()]
    cells.append((drawn - sum(n for n, _ in cells), rest))
    chi, freedom = sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1
    assert freedom > 100
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


def test_seeds_and_the_random_state_decide(llama):
    engine, asked = ContinuousEngine(llama, TOKENIZER, 3), SamplingParams(6)
    torch.manual_seed(1)
    first, before = engine.sample(prompts(), asked), torch.get_rng_state()
    seeded = engine.sample(prompts(), asked, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.sample(prompts(), asked, seed=4) == seeded != first
    torch.manual_seed(1)
    assert engine.sample(prompts(), asked) == first
    assert engine.sample(prompts(), asked) != first
    assert engine.sample([], asked) == []


def test_the_model_is_left_as_it_was():
    """An adapter, training mode, checkpointing, autocast and a generation configuration."""
    model = ending(make_model("qwen2"))
    add_adapter(model, LoraConfig(rank=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = generate(model, TOKENIZER, prompts(), GREEDY)
    model.generation_config.repetition_penalty = 9.0
    own, attention = model.generation_config.to_dict(), model.config._attn_implementation
    assert sample(model, TOKENIZER, prompts(), GREEDY, 4) == plain
    seen = []
    decoder = find_decoder(model).layers[0]
    handle = decoder.mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    engine = ContinuousEngine(
        model, TOKENIZER, 4, lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    engine.sample(prompts(), SamplingParams(3))
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert model.generation_config.to_dict() == own
    assert model.config._attn_implementation == attention
    assert model.training
    assert model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())
    model.forward = lambda **_: pytest.fail("of the pass")
    with pytest.raises(pytest.fail.Exception, match="of the pass"):
        sample(model, TOKENIZER, prompts(), GREEDY)
    assert model.training


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [("minimax", "has a cache of its own"), ("rwkv", "has a cache of its own"),
     ("deepseek_v32", "its cache has layers of the kind DynamicIndexedLayer")],
)  # fmt: skip
def test_families_whose_rows_cannot_be_told_apart_are_refused(kind, message):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = small_config(kind)
    with pytest.raises(ConfigError, match=f"rollout.engine=continuous can't .* x: .*{message}"):
        check_continuous(config, "x", "rollout.engine")
    model = make(config)
    for engine in ("continuous", "auto"):
        assert type(engine_on(model, TOKENIZER, engine)) is GenerateEngine
    with pytest.raises(ConfigError, match=message):
        sample(model, TOKENIZER, prompts(), GREEDY)


@pytest.mark.parametrize(
    ("device", "engine"), [("cpu", ContinuousEngine), ("cuda", GenerateEngine)]
)
def test_auto_is_what_was_measured_to_be_faster(monkeypatch, device, engine):
    monkeypatch.setattr(factory, "input_device", lambda model: torch.device(device))
    assert type(engine_on(make(small_config("llama")), TOKENIZER, "auto")) is engine


def test_a_run_is_refused_before_models_are_loaded(tmp_path):
    small_config("minimax").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    cfg = demo_config()
    cfg.rollout.engine, cfg.student.path = "continuous", str(tmp_path)
    with pytest.raises(ConfigError, match=r"rollout\.engine=continuous can.t sample from"):
        preflight(cfg)
    evaluation = EvalRunConfig(models=[str(tmp_path)], sets=["demo"], engine="continuous", limit=2)
    with pytest.raises(ConfigError, match=r"engine=continuous can't sample .* Use engine=generate"):
        evaluate_models(evaluation)


# Runs and evaluations -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_samples_and_evaluates_with_it(tmp_path, monkeypatch):
    used = []
    own = ContinuousEngine.sample

    def noted(self, given, *args, **kwargs):
        used.append((len(given), self.batch_size))
        return own(self, given, *args, **kwargs)

    monkeypatch.setattr(ContinuousEngine, "sample", noted)
    monkeypatch.setattr("oprd.engines.generate.generate", lambda *_: pytest.fail("of generate"))
    options = {"rollout__engine": "continuous", "rollout__batch_size": 4, "eval__batch_size": 16}
    for name in "ab":
        train(small_run(tmp_path / name, **options))
    # The teacher and the student before; a step, a step, an evaluation, a step, the student after.
    assert used[: len(used) // 2] == [(40, 16)] * 2 + [(8, 4)] * 2 + [(40, 16), (8, 4), (40, 16)]
    assert measured(tmp_path / "a") == measured(tmp_path / "b")


def test_evaluators_without_a_kind_use_generate():
    evaluator = Evaluator(demo_config().eval, None, None, None, None, None)
    assert evaluator.kind == "generate"
    assert why_not(small_config("llama")) is None


def test_an_evaluation_has_the_scores_of_generate(tmp_path):
    scores = []
    for engine in ("generate", "continuous"):
        cfg = EvalRunConfig(
            models=["demo:student"], sets=["demo"], engine=engine, limit=40, samples=1,
            temperature=0.0, batch_size=4, output_dir=str(tmp_path / engine),
        )  # fmt: skip
        assert cfg.unit == (16 if engine == "continuous" else 4)
        evaluate_models(cfg)
        scores.append((tmp_path / engine / "demo_student" / "samples.jsonl").read_text())
    assert scores[0] == scores[1]


# Ranks --------------------------------------------------------------------------------------------


def two_ranks(places):
    """What a rank of the test below does: it has other prompts than the other rank, or none."""
    device = distributed.init("cpu")
    model, rank = ending(make_model("llama")), distributed.rank()
    mine = [prompts()[:7], prompts()[7:], []][(rank + places // 100) % 3]
    whole = [generate(model, TOKENIZER, [p], GREEDY)[0] for p in mine]
    config = FsdpConfig(mode="always")
    shard(model, find_decoder(model).layers, config, make_mesh(device, None), device)
    assert sample(model, TOKENIZER, mine, GREEDY, places % 100) == whole
    distributed.shutdown()


@pytest.mark.slow
def test_ranks_of_a_sharded_model_make_the_same_passes(tmp_path):
    script = tmp_path / "two_ranks.py"
    module = "tests.oprd.engines.test_continuous"
    calls = "; ".join(f"two_ranks({places})" for places in (2, 102))
    script.write_text(f"from {module} import two_ranks; {calls}")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

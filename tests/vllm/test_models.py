"""Other models than the demo's, and other dtypes: an engine each."""

import pytest
import torch

from oprd.config import MAX_LOGPROB_GAP, LoraConfig, SamplingParams
from oprd.engines.logprob_gap import logprob_gap
from oprd.models.lora import add_adapter
from tests.support.tiny import make_model
from tests.vllm.conftest import start_engine

pytestmark = pytest.mark.vllm
WIDE = {"hidden_size": 128, "intermediate_size": 96}  # heads of 32: vLLM takes no smaller


@pytest.mark.parametrize(
    ("architecture", "dtype", "changes"),
    [
        ("gemma3", "float32", WIDE | {"head_dim": 32}),
        pytest.param("qwen3", "bfloat16", WIDE | {"head_dim": 32}, marks=pytest.mark.exhaustive),
        ("lora", "float32", WIDE),
    ],
)
def test_the_gap_is_rounding(tmp_path, architecture, dtype, changes):
    name = "qwen2" if architecture == "lora" else architecture
    model = make_model(name, vocab_size=15, eos_token_id=1, **changes).eval()
    if architecture == "lora":
        add_adapter(model, LoraConfig(rank=4))
    engine = start_engine(model, tmp_path, dtype=dtype, gap_responses=100)
    try:
        for version in range(2):
            with torch.no_grad():
                for p in model.parameters():  # of a LoRA student the adapter
                    if p.requires_grad:
                        p.add_(0.05 * torch.randn_like(p))
            engine.sync(version)
            rollouts = engine.sample([[5, 3, 6, 2, 9]] * 30, SamplingParams(max_new_tokens=9))
            found = logprob_gap(
                model, rollouts, last=9, max_tokens=10**6, pad_id=0, device=torch.device("cpu")
            )
            assert found.mean < (1e-5 if dtype == "float32" else MAX_LOGPROB_GAP[dtype])
            if dtype != "float32":
                assert found.mean > 1e-4  # it did run in another dtype
    finally:
        engine.close()

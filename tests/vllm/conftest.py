"""Tests with vLLM. Starting an engine takes most of their time, so one is shared."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from oprd.config import VllmConfig
from oprd.demo.task import make_tokenizer
from oprd.engines.vllm.engine import VllmEngine
from oprd.models.loading import demo_path
from oprd.models.weights import full_weights
from tests.support.tiny import make_model


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="vLLM is not installed: .ci/vllm makes an environment for it")
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(missing)


def start_engine(model, directory, ends=(1,), dtype="float32", **changes) -> VllmEngine:
    """With the model's weights at the time of each sync."""
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    return VllmEngine(
        VllmConfig(**changes),
        model_config=model.config,
        weights=lambda: full_weights(model),
        ends=ends,
        device=torch.device("cpu"),
        dtype=dtype,
        max_model_len=20,
        directory=directory,
    )


@pytest.fixture(scope="session")
def student():
    """Of the demo's size, with weights that leave the next token open."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        demo_path("demo:student"), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def shared(student, tmp_path_factory):
    """The engine of `student`; every response comes with its log-probs."""
    engine = start_engine(student, tmp_path_factory.mktemp("engine"), gap_responses=10**6)
    yield engine
    engine.close()


@pytest.fixture
def set_weights(student, shared) -> Callable[[int], None]:
    """Gives student and engine random weights, by seed: distributions that are far from one-hot,
    with EOS likely enough."""

    def set_weights(seed: int, sync: bool = True) -> None:
        other = make_model("qwen2", seed=seed, **_sizes(student.config))
        student.load_state_dict({k: 3 * v if v.dim() > 1 else v for k, v in _items(other)})
        if sync:
            shared.sync(max(shared.policy_version, 0) + 1)

    return set_weights


def _sizes(config) -> dict:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "intermediate_size", "max_position_embeddings")
    return {name: getattr(config, name) for name in names}


def _items(model):
    return model.state_dict().items()

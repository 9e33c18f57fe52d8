"""The weights that engines and files get."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from oprd.models.weights import full_weights
from tests.support.tiny import make_model


def make_experts():
    """A model that keeps a layer's experts as one tensor, and writes them one by one."""
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("architecture", ["qwen2", "smollm", "gemma3", "gpt2", "experts"])
def test_they_are_what_save_pretrained_writes(tmp_path, architecture):
    model = make_experts() if architecture == "experts" else make_model(architecture)
    found = list(full_weights(model))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert len(found) == len(written)  # each once
    for name, tensor in found:
        assert torch.equal(tensor, written[name]), name
    assert not any(tensor.requires_grad for _, tensor in found)

"""Models are run on a few tokens to see that they are built as OPRD assumes."""

import logging

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from oprd import attach
from oprd.errors import ConfigError
from oprd.models.decoder import cut, find_decoder
from oprd.models.self_check import check_structure, cut_if_it_runs, same_states
from tests.support.tiny import COMMON, make_batch, make_model

MAMBA = {"mamba_d_state": 8, "mamba_d_head": 8}
HYBRID = COMMON | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "falcon_h1": MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "bamba": MAMBA | {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "mlp", "attention"],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
    },
    "mamba": {"state_size": 4},
    "zamba2": {
        "mamba_d_state": 8, "n_mamba_heads": 8,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "layer_types": ["linear_attention", "hybrid"] * 2,
    },
    "opt": {},
    "xglm": {},
    "mpt": {},
}  # fmt: skip
"""Families that name or build things in ways of their own."""


def hybrid(kind: str, seed: int = 0, **changes):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**(HYBRID | KINDS.get(kind, {}) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def own_states(model, ids, attention):
    output = model.get_decoder()(
        input_ids=ids, attention_mask=attention, output_hidden_states=True, use_cache=False
    )
    states = output.hidden_states
    if model.config.model_type == "mamba":  # they begin with the first block's output
        return [*states[:-2], states[-1]]
    return states[1:]


@pytest.mark.parametrize("layers", ["even", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_models_own_hidden_states(kind, layers):
    student, teacher = hybrid(kind), hybrid(kind, seed=1)
    ids, attention, response = make_batch()
    ids, attention, response = ids[:1], torch.ones_like(attention[:1]), response[:1]
    out = attach(student, teacher, layers=layers, positions="all")(ids, attention, response)
    rows = response.bool()[0]
    blocks = [3] if layers == "last" else [0, 2]
    ours, theirs = own_states(student, ids, attention), own_states(teacher, ids, attention)
    wanted = [(ours[b][0, rows] - theirs[b][0, rows]).square().mean() for b in blocks]
    assert torch.allclose(out.loss, torch.stack(wanted).mean(), rtol=1e-4)


def test_states_of_another_shape_are_refused():
    """DeepSeek-V4's blocks put out several streams."""
    model = make_model("qwen2")
    first, second = model.model.layers[0], model.model.layers[1]
    one, two = first.forward, second.forward
    first.forward = lambda h, **k: one(h, **k)[:, :, None].expand(-1, -1, 4, -1)
    second.forward = lambda h, **k: two(h.mean(2), **k)
    with pytest.raises(ConfigError, match=r"block 0 have shape \(2, 5, 4, 32\) .* \(2, 5, 32\)"):
        attach(model, make_model("qwen2", seed=1))
    attach(make_model("qwen2"), make_model("qwen2", seed=1)).detach()
    assert not hasattr(first, "_oprd_tap")  # what was refused is left as it was
    with pytest.raises(ConfigError, match=r"the teacher .* block 0 have shape"):
        attach(make_model("qwen2"), model)
    attach(make_model("qwen2"), model, layers="last")


def test_a_norm_that_runs_twice_is_refused():
    model = make_model("qwen2")
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda h, **k: forward(model.model.norm(h), **k)
    with pytest.raises(ConfigError, match="the final norm 'norm' ran 2 times"):
        attach(model, make_model("qwen2", seed=1))
    attach(model, make_model("qwen2", seed=1), layers=[0, 1])
    # A teacher keeps it where it is cut.
    short = cut(find_decoder(model), 2)
    assert same_states(find_decoder(model), short, [0, 1], 3)


def test_states_that_are_not_the_models_own_are_refused():
    model = make_model("qwen2")
    forward = model.model.forward

    def with_more(**inputs):
        """As if something were added between two blocks."""
        output = forward(**inputs)
        if output.hidden_states is not None:
            states = output.hidden_states
            output.hidden_states = (*states[:2], states[2] + 1, *states[3:])
        return output

    model.model.forward = with_more
    with pytest.raises(ConfigError, match="block 1 are not entry 2 of its output_hidden_states"):
        attach(model, make_model("qwen2", seed=1))
    attach(model, make_model("qwen2", seed=1), layers=[0, 2])


def test_a_model_that_needs_all_its_blocks_is_kept_whole(monkeypatch, caplog):
    model = make_model("qwen2")
    decoder = find_decoder(model)
    assert cut_if_it_runs(decoder, 2).num_layers == 2
    monkeypatch.setattr(
        "oprd.models.self_check.same_states", lambda whole, short, blocks, depth: False
    )
    with caplog.at_level(logging.WARNING):
        assert cut_if_it_runs(decoder, 1) is decoder
    assert "Qwen2Model does not run with its first 1 layers alone" in caplog.text


def test_a_cut_that_does_not_run_is_no_cut():
    decoder = find_decoder(make_model("qwen2"))
    short = cut(decoder, 2)
    short.backbone.forward = None
    assert not same_states(decoder, short, [0, 1], 3)
    wrong = cut(find_decoder(make_model("qwen2", seed=1)), 2)
    assert not same_states(decoder, wrong, [0, 1], 3)
    assert same_states(decoder, cut(decoder, 2), [0, 1], 3)


@pytest.mark.parametrize("kind", ["gemma3n_text", "deepseek_v4"])
def test_the_configuration_alone_tells(kind):
    changes = {
        "gemma3n_text": {
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40, "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4,
        },
        "deepseek_v4": {
            "q_lora_rank": 8, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "index_head_dim": 8, "index_n_heads": 2,
        },
    }[kind]  # fmt: skip
    config = hybrid(kind, **changes).config
    with pytest.raises(
        ConfigError, match=r"the student .* is not built as OPRD assumes: the states"
    ):
        check_structure(config, [0, 1], "student")
    check_structure(make_model("llama").config, [0, 1, 2], "student")


def test_blocks_that_share_weights_can_not_be_sharded():
    config = hybrid("zamba2").config
    check_structure(config, [0, 3], "student")
    with pytest.raises(ConfigError, match=r"blocks 1 and 3 share the weight .*fsdp\.mode=never"):
        check_structure(config, [0, 3], "student", sharded=True)
    check_structure(make_model("qwen2").config, [0, 2], "student", sharded=True)


def test_states_that_are_halved_outside_of_training_are_refused():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "context_length": 32}
    for every, refused in ((2, True), (6, False), (0, False)):
        config = CONFIG_MAPPING["rwkv"](**sizes, rescale_every=every)
        if not refused:
            check_structure(config, [0, 3], "student")
            continue
        with pytest.raises(ConfigError, match="set rescale_every to 0"):
            check_structure(config, [0, 3], "student")

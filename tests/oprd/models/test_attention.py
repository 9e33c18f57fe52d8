"""Attention implementations: what a run needs, refused before its weights are loaded; packing."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, modeling_flash_attention_utils
from transformers.integrations import flash_attention

from oprd.cli.doctor import report
from oprd.config import DistillConfig
from oprd.data.collate import collate
from oprd.distill.distiller import attach
from oprd.errors import ConfigError, Unreachable
from oprd.models import attention
from oprd.models.attention import attention_problem, check_attention, varlen_inputs
from oprd.models.decoder import find_decoder
from oprd.models.packing_check import check_packing
from oprd.training.preflight import preflight
from tests.oprd.models.test_packing_check import make_rollouts
from tests.oprd.training.test_trainer import small_run
from tests.support.tiny import make_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_what_is_missing_is_said_with_the_fix(monkeypatch):
    for name in (None, "eager", "sdpa", "flex_attention"):
        assert attention_problem(name, CPU) is None
    assert "it needs a GPU" in attention_problem("flash_attention_2", CPU)
    assert "no such implementation: choose eager, sdpa" in attention_problem("flash", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr(attention, "is_kernels_available", lambda: False)
    problem = attention_problem("flash_attention_2", GPU)
    assert "pip install 'transformers[kernels]'" in problem
    assert "flash-attn" in problem
    assert "package kernels" in attention_problem("kernels-community/flash-attn2", GPU)
    assert "capability 9.0, and this one has 8.6" in attention_problem("flash_attention_4", GPU)
    monkeypatch.setattr(attention, "is_kernels_available", lambda: True)
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        assert attention_problem(name, GPU) is None


def test_flash_attention_is_refused_in_float32_and_by_models_without_it(monkeypatch):
    monkeypatch.setattr(attention, "attention_problem", lambda *_: None)
    qwen = make_model("qwen2").config
    check_attention("flash_attention_2", qwen, "student", "bfloat16", CPU)
    with pytest.raises(ConfigError, match=r"bfloat16 or float16 only.*set autocast=bfloat16"):
        check_attention("kernels-community/flash-attn2", qwen, "student", "float32", CPU)
    bloom = AutoConfig.for_model("bloom")
    with pytest.raises(ConfigError, match="BloomForCausalLM has no such attention"):
        check_attention("flash_attention_2", bloom, "teacher", "bfloat16", CPU)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_run_is_refused_before_weights_are_loaded(tmp_path, who):
    cfg = small_run(tmp_path / "run")
    model = getattr(cfg, who)
    model.attn_implementation, model.dtype = "flash_attention_2", "float32"
    with pytest.raises(ConfigError, match=rf"{who}.attn_implementation=flash_attention_2 computes"):
        preflight(cfg)
    cfg.autocast = "bfloat16"
    with pytest.raises(Unreachable, match=rf"{who}.attn_implementation=.* it needs a GPU"):
        preflight(cfg)
    assert any("it needs a GPU" in item for item in preflight(cfg, dry_run=True).unchecked)


def test_the_doctor_says_what_is_usable():
    text = report()
    assert "  sdpa               live" in text
    assert "  flash_attention_2  " in text
    assert "backends:" in text  # the kernels' own report


# Packing with FlashAttention, whose functions are replaced by loops over sdpa ---------------------


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
    """flash_attn_varlen_func, (T, heads, head_dim), sequence by sequence."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int  # a tensor would wait for the GPU
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    CALLS.append(lengths)
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in part), is_causal=causal, scale=softmax_scale,
            enable_gqa=True,
        ).transpose(0, 1)
        for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]  # fmt: skip
    return torch.cat(parts)


def whole(q, k, v, causal, softmax_scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    ).transpose(1, 2)


CALLS: list = []


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention of `transformers`, with other kernels."""
    utils = modeling_flash_attention_utils
    CALLS.clear()
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: (
        whole, varlen, None, utils._pad_input, utils._unpad_input))  # fmt: skip
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    AttentionInterface.register("flash_stand_in", flash_attention.flash_attention_forward)
    return "flash_stand_in"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_packed_rollouts_take_the_path_of_many_lengths(flash, architecture):
    """With the lengths, which are found once a forward pass, not in every layer."""
    rollouts = make_rollouts()
    results = []
    for packed, implementation in [(True, flash), (False, "eager")]:
        student, teacher = make_model(architecture, 0), make_model(architecture, 1)
        for model in (student, teacher):
            model.set_attn_implementation(implementation)
        distiller = attach(student, teacher, layers=DistillConfig().layers)
        CALLS.clear()
        batch = collate(rollouts, 0, "cpu", packed=packed)
        out = distiller(
            batch.input_ids, batch.attention_mask, batch.response_mask, batch.position_ids
        )
        out.loss.backward()
        if packed:
            deepest = max(block for _, block in distiller.pairs) + 1
            assert [[len(r) for r in rollouts]] * (3 + deepest) == CALLS
        results.append((out.loss.detach(), *(p.grad for p in student.parameters())))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_check_of_packing_accepts_it(flash):
    model = make_model("qwen2").eval()
    model.set_attn_implementation(flash)
    check_packing(find_decoder(model), "student")
    assert [8, 8] in CALLS


def test_lengths_of_packed_sequences():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    found = varlen_inputs(positions)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert found["max_length_q"] == found["max_length_k"] == 3

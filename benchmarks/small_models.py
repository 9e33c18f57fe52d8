"""Small models, with random weights, of all families that transformers builds as causal LMs.

A family's values are those of `SMALL` that its configuration has, parts of a multimodal one
included, and its own in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, VOCABULARY, LARGEST = 4, 40, 10_000_000
"""Blocks, tokens, and the number of weights beyond which a model counts as not small."""

SMALL: dict[str, Any] = {
    # Sizes that every decoder has, by the names that configurations use.
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "use_cache": True, "ffn_dim": 48, "ffn_hidden_size": 48, "decoder_layers": LAYERS,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "embedding_size": 32,
    "word_embed_proj_dim": 32, "rotary_dim": 4,
    # Dropout, off: the models are compared in training.
    "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "dropout": 0.0,
    "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0,
    "embedding_dropout": 0.0, "layerdrop": 0.0, "ffn_dropout": 0.0,
    # Attention over a window, and low-rank attention.
    "sliding_window": 4, "attention_window_size": 8, "attention_chunk_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "swa_head_dim": 8,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "sliding_window_size": 4,
    "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": VOCABULARY,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2,
    "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1,
    "num_dense_layers": 1, "intermediate_size_mlp": 48,
    # Recurrent states.
    "state_size": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_d_conv": 4,
    "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "lru_width": 32,
    # Embeddings of each layer.
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    # Other parts of multimodal models.
    "image_size": 16, "patch_size": 8, "num_channels": 3, "depth": 1, "num_heads": 4,
    "out_hidden_size": 32, "projection_dim": 32,
}  # fmt: skip

STATES_FROM_BLOCK_0 = {"mamba", "mamba2", "falcon_mamba", "rwkv"}
"""Families whose ``hidden_states`` begin with those of block 0, not with the embeddings."""

DRAWS_EXPERTS = {"phimoe"}
"""Families that draw experts at random in training, and are compared in evaluation mode."""

SLIDING = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {"layer_types": SLIDING, "global_head_dim": 8, "num_kv_shared_layers": 0}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
LINEAR = ["linear_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
QWEN4 = {
    "layer_types": LINEAR, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 50, "heads_per_ngram": 2, "split_ngram_parts": 2, "ple_embed_dim": 8,
    "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, ROPE),
    },
    "cpmant": {
        "prompt_types": 2, "prompt_length": 4, "segment_types": 2, "dim_head": 8, "dim_ff": 48,
    },
    "ctrl": {"n_positions": 64, "dff": 48},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2,
        },
    },
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "lm_head_multiplier": 0.1,
    },
    "gemma3n_text": {
        "layer_types": SLIDING, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * LAYERS, "intermediate_size": [48] * LAYERS,
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "granite": {"logits_scaling": 4.0},
    "jamba": {
        "mamba_dt_rank": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}, "head_dim": 16},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "longcat_flash": {"num_layers": LAYERS, "zero_expert_num": 0},  # or ranks use no expert
    "mllama_text_model": {"cross_attention_layers": []},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40},
    "xlnet": {"d_head": 8},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minimax": {"layer_types": LINEAR, "block_size": 4},
    "nemotron_h": {
        "mamba_num_heads": 4, "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "mlp", "attention"],
    },
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local"] * LAYERS,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "layer_types": ["linear_attention", "hybrid"] * 2,
    },
}  # fmt: skip
"""What else a family's configuration needs to be small, or to have every kind of block."""


def families() -> list[str]:
    """Return the model types that transformers builds as causal LMs."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str) -> PretrainedConfig:
    """Return a small configuration of a family."""
    cls = CONFIG_MAPPING[kind]
    return cls(**_small_values(cls))


def _small_values(cls: type[PretrainedConfig]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    values = {name: value for name, value in SMALL.items() if name in names}
    if {"kv_lora_rank", "num_key_value_heads"} <= names:  # keys of every head come from one vector
        values["num_key_value_heads"] = values["num_attention_heads"]
    if cls.sub_configs:
        default = cls()
        for part in cls.sub_configs:
            if isinstance(inner := getattr(default, part, None), PretrainedConfig):
                values[part] = _small_values(type(inner)) | {"model_type": inner.model_type}
    return values | FAMILIES.get(cls.model_type, {})


def make(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a causal LM with random weights, in float32 and evaluation mode.

    Norms and biases, that begin at 1 or 0, are moved, or a tap at the wrong side of one would not
    show.

    Raises:
        ValueError: if it has more than `LARGEST` weights.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights: not small")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model

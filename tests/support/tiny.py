"""Real Hugging Face architectures at a size that runs in milliseconds."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 40
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", COMMON | {"num_key_value_heads": 2}),
    "smollm": ("LlamaConfig", COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", COMMON | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", COMMON | {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": ("Gemma2Config", COMMON | {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        COMMON | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    ),
    "phi3": ("Phi3Config", COMMON | {"num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def make_model(architecture: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A randomly initialised causal LM of one of ARCHITECTURES."""
    config_class, values = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**(values | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # norms that start at 1 or 0 would hide a tap on the wrong side of one
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch(padding: str = "right", seed: int = 0) -> tuple[torch.Tensor, ...]:
    """input_ids (3, 12), attention_mask and response_mask, prompts and responses of any length."""
    generator = torch.Generator().manual_seed(seed)
    prompt_response = [(4, 8), (3, 5), (5, 1)]
    length = 12
    ids = torch.zeros(3, length, dtype=torch.long)
    attention, response = torch.zeros(2, 3, length, dtype=torch.long)
    for i, (p, r) in enumerate(prompt_response):
        start = 0 if padding == "right" else length - p - r
        ids[i, start : start + p + r] = torch.randint(3, VOCAB, (p + r,), generator=generator)
        attention[i, start : start + p + r] = 1
        response[i, start + p : start + p + r] = 1
    return ids, attention, response.bool()


def make_pair_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Another tokenizer of the demo's text: the two digits that end a response are one token, so
    that ``"2071"`` is ``"2"``, ``"0"``, ``"71"``: whatever reads them is told where it ended."""
    symbols = ["<pad>", "<eos>", "<unk>", "+", "=", *"0123456789"]
    symbols += [f"{i:02d}" for i in range(100)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d$|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )

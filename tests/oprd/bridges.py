"""A teacher of another shape than the demo's student, and fits and runs with it."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from oprd.bridge.checks import FitConfig
from oprd.config import TrainConfig
from oprd.demo.task import make_tokenizer
from tests.oprd.runs import set_options, small_run


def write_teacher(directory) -> str:
    """Six layers, 48 wide, random weights, the demo's tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def small_fit(file, teacher, **changes) -> FitConfig:
    cfg = FitConfig(output=str(file), prompts=60, rank=8, ridge=1e-4)
    cfg.teacher.path = teacher
    return set_options(cfg, changes)


def bridged_run(directory, teacher, bridge_file, **changes) -> TrainConfig:
    changes = {"teacher__path": teacher, "bridge__path": str(bridge_file)} | changes
    return small_run(directory, **changes)

"""Make the teachers of the Bridge demos: ``python -m oprd.demo.bridge_teachers [--output_dir ..]``.

Both learn the demo's task from nothing, so that they share no origin with the demo's student, and
have another depth and width: five layers, 160 wide, against four and 128.

- ``other/`` has the student's tokenizer and architecture;
- ``pairs/`` is an OLMo 2 that reads and writes two digits in one token: with another vocabulary,
  distributions over the next token can't be compared at all.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from oprd.demo.make import make_model
from oprd.demo.more import accuracy, train, without_hint
from oprd.demo.task import make_pair_tokenizer, make_splits, make_tokenizer

WIDTH, LAYERS = 160, 5


def make_olmo(
    tokenizer: PreTrainedTokenizerFast, width: int = WIDTH, layers: int = LAYERS
) -> Olmo2ForCausalLM:
    """An OLMo 2 with 4 heads and an untied head. (Beside a Qwen2, transformers would load the
    tokenizer with the pre-tokenizer and decoder of Qwen2's.)"""
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    seed: int,
    steps: int,
) -> None:
    """Train a model on sums and write it."""
    known = make_splits()
    train(model.train(), tokenizer, [(known.rest, without_hint)], steps, 1e-3, seed, warmup=50)
    share = accuracy(model.eval(), tokenizer, known.val, without_hint)
    print(f"{directory.name}: validation accuracy {share:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_teachers(
    output_dir: Path = Path("runs/demo_bridge"), seed: int = 1, steps: int = 1800
) -> None:
    """Train and write both.

    Args:
        output_dir: where.
        seed: of the initial weights and the batches.
        steps: of supervised training.
    """
    digits, pairs = make_tokenizer(), make_pair_tokenizer()
    torch.manual_seed(seed)
    teach(make_model(digits, WIDTH, LAYERS), digits, output_dir / "other", seed, steps)
    torch.manual_seed(seed)
    teach(make_olmo(pairs), pairs, output_dir / "pairs", seed, steps)


if __name__ == "__main__":
    auto_cli(make_teachers)

"""Make a teacher of the Bridge demos: ``python -m oprd.demo.bridge_teacher [--tokens pairs]``.

It learns the demo's task from nothing, so that it shares no origin with the demo's student, and has
another depth and width. With ``digits`` (``other/``) five layers, 160 wide, and the student's
tokenizer; with ``pairs`` (``pairs/``) six layers, 96 wide, and a tokenizer of its own, in which
some numbers of two digits are single tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from oprd.demo.make import make_model
from oprd.demo.more import accuracy, train, without_hint
from oprd.demo.task import make_splits, make_tokenizer

SYMBOLS = ("<pad>", "<eos>", "<unk>", "+", "=", *"0123456789")
PAIRS = tuple(str(i) for i in range(80, 100))


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters with a token for every number from 80 to 99, which splits ``"2081"`` into
    ``"2"``, ``"0"``, ``"81"``. The digits of a prompt stay apart. No id means what it means to the
    student."""
    vocabulary = {token: i for i, token in enumerate((*PAIRS, *SYMBOLS))}
    merges = [(pair[0], pair[1]) for pair in PAIRS]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\d(?=\d*[+=])|\d+|."), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_olmo(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Olmo2ForCausalLM:
    """An OLMo 2. (Beside a Qwen2, `AutoTokenizer` would load our tokenizer as Qwen2's class, with
    that one's pre-tokenizer and decoder.)"""
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Olmo2ForCausalLM(config)


def make_teacher(
    output_dir: Path = Path("runs/demo_bridge"),
    tokens: Literal["digits", "pairs"] = "digits",
    seed: int = 1,
    steps: int | None = None,
) -> None:
    """Train it and write it to ``other/`` or ``pairs/``.

    Args:
        output_dir: where.
        tokens: of the responses: single digits, as the student's, or some pairs of them too.
        seed: of the initial weights and the batches.
        steps: of supervised training; null: 1,800 (digits) or 1,200 (pairs).
    """
    known = make_splits()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if tokens == "digits":
        name, tokenizer, enough = "other", make_tokenizer(), 1800
        model = make_model(tokenizer, width=160, layers=5).train()
    else:
        name, tokenizer, enough = "pairs", make_pair_tokenizer(), 1200
        model = make_olmo(tokenizer, width=96, layers=6).train()
    count = enough if steps is None else steps
    train(model, tokenizer, [(known.rest, without_hint)], count, 1e-3, seed, warmup=50)
    share = accuracy(model.eval(), tokenizer, known.val, without_hint)
    print(f"validation accuracy {share:.3f}")
    model.to(torch.bfloat16).save_pretrained(output_dir / name)
    tokenizer.save_pretrained(output_dir / name)


if __name__ == "__main__":
    auto_cli(make_teacher)

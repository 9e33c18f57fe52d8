"""Make a teacher of the Bridge demos: ``python -m oprd.demo.bridge_teacher [--tokens pairs]``.

It learns the demo's task from nothing, so that it shares no origin with the demo's student, and has
another depth and width: five layers, 160 wide, against four and 128. Its tokenizer is the student's
(``other/``), or has tokens for half of all pairs of digits besides (``pairs/``).

The teacher with pairs learns from texts that are split at random (BPE dropout, Provilkov et al.,
2020). Otherwise a pair that is not one token, though it could be, would tell it that something is
odd about the text: a student's unfinished answer, say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from oprd.demo.make import make_model
from oprd.demo.more import accuracy, train, without_hint
from oprd.demo.task import make_splits, make_tokenizer

SYMBOLS = ("<pad>", "<eos>", "<unk>", "+", "=", *"0123456789")
PAIRS = tuple(f"{i:02d}" for i in range(0, 100, 2))


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters with a token for every even number of two digits, which splits ``"2071"``
    into ``"20"``, ``"7"``, ``"1"``. The digits of a prompt stay apart."""
    vocabulary = {token: i for i, token in enumerate((*SYMBOLS, *PAIRS))}
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
    steps: int = 1800,
) -> None:
    """Train it and write it to ``other/`` or ``pairs/``.

    Args:
        output_dir: where.
        tokens: of the responses: single digits, as the student's, or pairs of them too.
        seed: of the initial weights, the batches and how texts are split.
        steps: of supervised training.
    """
    known = make_splits()
    torch.manual_seed(seed)
    if tokens == "digits":
        name, tokenizer = "other", make_tokenizer()
        model = make_model(tokenizer, width=160, layers=5).train()
    else:
        name, tokenizer = "pairs", make_pair_tokenizer()
        model = make_olmo(tokenizer, width=160, layers=5).train()
        tokenizer.backend_tokenizer.model.dropout = 0.5
    train(model, tokenizer, [(known.rest, without_hint)], steps, 1e-3, seed, warmup=50)
    if tokens == "pairs":
        tokenizer.backend_tokenizer.model.dropout = None
    share = accuracy(model.eval(), tokenizer, known.val, without_hint)
    print(f"validation accuracy {share:.3f}")
    model.to(torch.bfloat16).save_pretrained(output_dir / name)
    tokenizer.save_pretrained(output_dir / name)


if __name__ == "__main__":
    auto_cli(make_teacher)

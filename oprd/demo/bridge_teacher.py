"""Make a teacher for the Bridge demos: ``python -m oprd.demo.bridge_teacher [--tokens pairs]``.

The teacher is trained from scratch on the demo's task, so that it shares no origin with the demo's
student, and has another depth and width. With ``digits`` (``other/``) it has five layers, width 160
and the student's tokenizer. With ``pairs`` (``pairs/``) it has six layers, width 96 and its own
tokenizer, in which some two-digit numbers are single tokens. On two cores the first takes about
seven minutes, the second about four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from oprd.demo.make import make_model
from oprd.demo.more import accuracy, train, without_hint
from oprd.demo.task import make_splits, make_tokenizer
from oprd.output_paths import check_output_dir

SYMBOLS = ("<pad>", "<eos>", "<unk>", "+", "=", *"0123456789")
MINUTES = {
    "digits": "about seven minutes on two cores",
    "pairs": "about four minutes on two cores",
}
PAIRS = tuple(str(i) for i in range(80, 100))


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """Make a character-level BPE tokenizer with a token for every number from 80 to 99.

    It splits ``"2081"`` into ``"2"``, ``"0"``, ``"81"``. The digits of a prompt are not merged.
    Every id has another meaning than in the student's tokenizer.
    """
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
    """Make an OLMo 2 with 4 heads and an untied head.

    It is not a Qwen2, because `AutoTokenizer` would then load our tokenizer as Qwen2's class, with
    the pre-tokenizer and decoder of that class.
    """
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
    """Train a teacher and write it to ``other/`` or ``pairs/``.

    This takes about seven minutes (digits) or four (pairs) on two cores, and says how far it is.

    Args:
        output_dir: parent directory of ``other/`` and ``pairs/``.
        tokens: tokens of the responses: single digits, as the student's, or also some pairs of
            digits.
        seed: seed of the initial weights and the batches.
        steps: steps of supervised training; null: 1,800 (digits) or 1,200 (pairs).
    """
    check_output_dir(output_dir)
    known = make_splits()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if tokens == "digits":
        name, tokenizer, default_steps = "other", make_tokenizer(), 1800
        model = make_model(tokenizer, width=160, layers=5).train()
    else:
        name, tokenizer, default_steps = "pairs", make_pair_tokenizer(), 1200
        model = make_olmo(tokenizer, width=96, layers=6).train()
    count = default_steps if steps is None else steps
    print(f"training a teacher from scratch, {MINUTES[tokens]}", flush=True)
    train(model, tokenizer, [(known.rest, without_hint)], count, 1e-3, seed, warmup=50, name=name)
    share = accuracy(model.eval(), tokenizer, known.val, without_hint)
    print(f"validation accuracy {share:.3f}; written to {output_dir / name}")
    model.to(torch.bfloat16).save_pretrained(output_dir / name)
    tokenizer.save_pretrained(output_dir / name)


if __name__ == "__main__":
    auto_cli(make_teacher)

"""A tiny model that reads any text, a byte a token."""

import shutil

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import make_model


def bytes_tokenizer():
    """Two special tokens, and one for each byte."""
    symbols = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_bytes_model(directory, seed=0, **changes):
    """Write a random model with `bytes_tokenizer` to a directory, and return its path as text."""
    tokenizer = bytes_tokenizer()
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "eos_token_id": 1}
    model = make_model("qwen2", seed, **(options | changes))
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)

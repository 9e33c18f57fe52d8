"""What is written down of a model, to recognise it later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
)


def model_info(
    config: PretrainedConfig,
    path: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelInfo:
    """A model as bridges know it."""
    text = config.get_text_config()
    vocabulary = None if tokenizer is None else fingerprint(tokenizer.get_vocab())
    return ModelInfo(text.hidden_size, text.num_hidden_layers, path, vocabulary)


@dataclass(frozen=True)
class ModelInfo:
    """A model as a bridge must know it.

    Attributes:
        width: d, the hidden size.
        layers: its depth; None: not known (imported).
        path: where it was loaded from.
        vocabulary: `fingerprint` of its tokenizer.
    """

    width: int
    layers: int | None = None
    path: str | None = None
    vocabulary: str | None = None


def fingerprint(vocabulary: Mapping[str, int]) -> str:
    """A tokenizer's tokens and their ids, as a short hash."""
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

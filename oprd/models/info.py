"""Descriptions of models, by which a bridge recognises the models that it was fitted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from oprd.errors import ConfigError


def model_info(
    config: PretrainedConfig,
    path: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelInfo:
    """Return the description of a model that bridges store and compare.

    Raises:
        ConfigError: if the configuration does not say how many layers of which width there are.
    """
    text = config.get_text_config()
    # LongCat's blocks have two attentions, and its num_hidden_layers counts these.
    layers_name = "num_layers" if text.model_type == "longcat_flash" else "num_hidden_layers"
    width, layers = (getattr(text, name, None) for name in ("hidden_size", layers_name))
    if width is None or layers is None:
        raise ConfigError(
            f"{path or 'the model'}: a configuration of type {text.model_type} has no hidden_size "
            "or num_hidden_layers, so OPRD can't tell its layers"
        )
    vocabulary = None if tokenizer is None else fingerprint(tokenizer.get_vocab())
    return ModelInfo(width, layers, path, vocabulary)


@dataclass(frozen=True)
class ModelInfo:
    """The description of a model that bridges store and compare.

    Attributes:
        width: d, the hidden size.
        layers: number of layers; None: not known (an imported bridge).
        path: path that the model was loaded from; None: not known.
        vocabulary: `fingerprint` of the model's tokenizer; None: not known.
    """

    width: int
    layers: int | None = None
    path: str | None = None
    vocabulary: str | None = None


def fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Return a short hash of a tokenizer's tokens and their ids."""
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

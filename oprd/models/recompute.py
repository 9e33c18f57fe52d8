"""Gradient checkpointing of some of a model's blocks.

A recomputed block keeps its input alone, and runs its forward again in the backward pass. The first
blocks are those to recompute: by then the backward has freed the activations of the last ones.
"""

from __future__ import annotations

import logging
from typing import Any

from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder

logger = logging.getLogger(__name__)


def recompute_blocks(model: Any, number: bool | int = True) -> int:
    """Recompute the activations of the first ``number`` blocks; keep those of the others.

    Can be called again, with another number.

    Args:
        model: a causal LM of `transformers`.
        number: True: all blocks; False or 0: none.

    Returns:
        The number of blocks that are recomputed.

    Raises:
        ConfigError: if the model can't recompute blocks, or not some of them alone.
    """
    layers = find_decoder(model).layers
    wanted = len(layers) if number is True else min(int(number), len(layers))
    if int(number) > len(layers):
        logger.info(
            f"note: student.gradient_checkpointing={number}, but {type(model).__name__} has "
            f"{len(layers)} blocks: all are recomputed"
        )
    if not wanted:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            _call(model, "disable")
        return 0
    try:
        _call(model, "enable", {"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"{type(model).__name__} can't recompute activations "
            f"(student.gradient_checkpointing): {error}"
        ) from error
    if wanted < len(layers):
        if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
            raise ConfigError(
                f"{type(model).__name__} can't recompute {wanted} of its {len(layers)} blocks: "
                "set student.gradient_checkpointing to true or false"
            )
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index < wanted  # type: ignore[assignment]
    return wanted


def _call(model: Any, what: str, *arguments: Any) -> None:
    """Call the model's method; before transformers 5.20 it had another name."""
    new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
    getattr(model, new if hasattr(model, new) else old)(*arguments)

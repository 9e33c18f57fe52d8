"""`torch.compile` of decoder layers: one compilation serves all layers, because they are alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from oprd.models.decoder import find_decoder


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place. Call this before the model is sharded."""
    for layer in find_decoder(model).layers:
        layer.compile()


@contextmanager
def eager_layers(model: Any) -> Iterator[None]:
    """Run the layers uncompiled within this context.

    In `generate` the cache grows with every token, and compiled layers would be recompiled again
    and again.
    """
    compiled = []
    for layer in find_decoder(model).layers:
        if layer._compiled_call_impl is not None:
            compiled.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in compiled:
            layer._compiled_call_impl = call

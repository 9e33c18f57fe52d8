"""`torch.compile` of decoder layers: they are alike, so that one compilation serves all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from oprd.models.decoder import find_decoder


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place; before it is sharded."""
    for layer in find_decoder(model).layers:
        layer.compile()


@contextmanager
def eager_layers(model: Any) -> Iterator[None]:
    """Run layers uncompiled while open: in `generate` the cache grows with every token, and a layer
    would be compiled again and again."""
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

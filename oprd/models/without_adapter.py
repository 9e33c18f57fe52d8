"""A LoRA student with its adapter off: a teacher that takes no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """While open, the model is what it was before it got its adapter (any of PEFT's layers)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    on = [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
    trained = [(p, p.requires_grad) for p in model.parameters()]

    def switch(enabled: bool) -> None:
        for module in on:
            module.enable_adapters(enabled)
        # PEFT freezes what it switches off. FSDP2 would remember that of a first forward pass.
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    switch(False)
    try:
        yield
    finally:
        switch(True)


class WithoutAdapter:
    """A model with its adapter off, to be used as that model is; it holds no weights of its own.

    Everything is the model's, but what runs while this is called, generates, or is a `Decoder`
    leaves the adapter out.
    """

    def __init__(self, model: Any) -> None:
        self.__dict__["adapted"] = model

    def running(self) -> Any:
        """The context in which the adapter is off; `find_decoder` hands it to the `Decoder`."""
        return adapter_off(self.adapted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.running():
            return self.adapted(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        with self.running():
            return self.adapted.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["adapted"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.adapted, name, value)

"""A LoRA student with its adapter off: a teacher that takes no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Switch the model's adapter (any of PEFT's layers) off within this context."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    on = [m for m in model.modules() if isinstance(m, kinds) and not m.disable_adapters]
    trained = [(p, p.requires_grad) for p in model.parameters()]

    def switch(enabled: bool) -> None:
        for module in on:
            module.enable_adapters(enabled)
        # PEFT freezes the adapters that it switches off, and FSDP2 would keep the requires_grad of
        # the first forward pass.
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    switch(False)
    try:
        yield
    finally:
        switch(True)


class WithoutAdapter:
    """A view of a model with its adapter off. It is used like the model and holds no weights.

    Attributes are read from and written to the model. A call, `generate`, and a `Decoder` made by
    `find_decoder` run the model without its adapter.
    """

    def __init__(self, model: Any) -> None:
        self.__dict__["adapted"] = model

    def running(self) -> Any:
        """Return the context in which the adapter is off. `find_decoder` passes this method on to
        the `Decoder`."""
        return adapter_off(self.adapted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.running():
            return self.adapted(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's `generate` without the adapter."""
        with self.running():
            return self.adapted.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["adapted"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.adapted, name, value)

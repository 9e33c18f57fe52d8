"""Liger's Triton kernels (RMSNorm, LayerNorm, SwiGLU, GeGLU, RoPE) in models of `transformers`.

    pip install liger-kernel

Liger's own function replaces what it knows of a model. It would also replace classes and functions
of the modules that the model comes from, by which every other model of that architecture in the
process would change: one without weights, on which checks run, and a teacher that was to stay as it
is. Here only the model itself is changed. Liger's losses, which need the LM head, are never used.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from oprd.errors import ConfigError, cannot_use
from oprd_kernels.doctor import version_of

NO_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def liger_problem(device: torch.device) -> str | None:
    """Return why Liger's kernels can't run on ``device``, and what to do; or None."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its Triton kernels need a GPU, and the device is the CPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed: pip install liger-kernel"
    try:
        _known()
    except Exception as error:  # it may not fit the installed torch, Triton or transformers
        return f"liger-kernel can't be imported: {error}"
    return None


def check_liger(config: PretrainedConfig | None, who: str, device: torch.device) -> None:
    """Check that ``WHO.liger`` can be used.

    Args:
        config: the model's configuration, if it is known.

    Raises:
        ConfigError: if Liger does not know the architecture. As `Unreachable`: if this machine
            lacks what is needed, which another may have.
    """
    if problem := liger_problem(device):
        raise cannot_use(f"{who}.liger=true", problem)
    if config is not None and config.model_type not in _known():
        raise ConfigError(
            f"{who}.liger=true: liger-kernel has no kernels for the architecture "
            f"{config.model_type}: leave the option out"
        )


def _known() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def apply_liger(model: nn.Module) -> None:
    """Replace the norms, the MLPs' activation and RoPE of a model by Liger's, in place.

    Weights and their names stay as they are. Call this before adapters are added, and before the
    model is compiled or sharded.

    Raises:
        ConfigError: if nothing was replaced.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    before = {module: vars(module).get("forward") for module in model.modules()}
    with _only_here(model), _quiet():
        _apply_liger_kernel_to_instance(model=model, **NO_LOSSES)
    if all(vars(module).get("forward") == forward for module, forward in before.items()):
        raise ConfigError(
            f"liger-kernel {version_of('liger-kernel')} replaced nothing in "
            f"{type(model).__name__}: leave liger out"
        )


@contextmanager
def _only_here(model: nn.Module) -> Iterator[None]:
    """Undo at the end what was replaced in the modules of `transformers` within this context.

    Methods of ``model`` that use a replaced function, as attention uses RoPE, keep using it.
    """
    sources = {type(module).__module__ for module in model.modules()}
    spaces = [vars(sys.modules[n]) for n in sources if n.startswith("transformers.models.")]
    before = [dict(space) for space in spaces]
    try:
        yield
        for space, old in zip(spaces, before, strict=True):
            new = {n: f for n, f in space.items() if n in old and f is not old[n]}
            functions = {n: f for n, f in new.items() if isinstance(f, types.FunctionType)}
            for module in model.modules() if functions else ():
                _bind(module, space, functions)
    finally:
        for space, old in zip(spaces, before, strict=True):
            space.update({n: f for n, f in old.items() if space.get(n) is not f})


def _bind(module: nn.Module, space: dict[str, Any], functions: dict[str, Any]) -> None:
    """Give a module a ``forward`` that uses ``functions`` where its own names them."""
    own: Any = type(module).forward
    inner = own
    while hasattr(inner, "__wrapped__"):  # decorators of transformers
        inner = inner.__wrapped__
    if getattr(inner, "__globals__", None) is not space or "forward" in vars(module):
        return
    if not functions.keys() & set(inner.__code__.co_names):
        return
    names = {**space, **functions}
    names.pop("__name__", None)  # or torch.compile would look names up in the module itself
    forward = types.FunctionType(
        inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__
    )
    forward.__kwdefaults__ = inner.__kwdefaults__
    module.forward = types.MethodType(forward, module)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the line that Liger logs for every model."""
    logger = logging.getLogger("liger_kernel.transformers.monkey_patch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

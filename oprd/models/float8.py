"""A frozen teacher whose linear layers compute in float8, by torchao.

    pip install torchao

Weights are rounded once, with one scale for each row. Inputs are rounded in each forward pass, with
one scale for each token. The LM head and the embeddings stay as they are. Rounding makes an error
in the states that the student learns from, which `measure` tells.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oprd.errors import ConfigError, cannot_use
from oprd.models.decoder import find_decoder, watch

CAPABILITY = (8, 9)
"""The least compute capability of a GPU that multiplies float8 matrices: Ada, then Hopper."""
MULTIPLE = 16
"""Both sizes of a layer must be multiples of this, or it stays as it is."""


def float8_problem(device: torch.device) -> str | None:
    """Return why linear layers can't compute in float8 on ``device``, and what to do; or None."""
    if device.type != "cuda":
        return "it needs a GPU, and the device is the CPU"
    if importlib.util.find_spec("torchao") is None:
        return "the package torchao is not installed: pip install torchao"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < CAPABILITY:
        found = ".".join(map(str, capability))
        return f"it needs a GPU of compute capability 8.9 (Ada, Hopper), and this one has {found}"
    return None


def check_float8(who: str, dtype: str, device: torch.device) -> None:
    """Check that ``WHO.fp8`` can be used.

    Args:
        dtype: the option ``WHO.dtype``.

    Raises:
        ConfigError: if the weights are not bfloat16. As `Unreachable`: if this machine lacks what
            is needed, which another may have.
    """
    if problem := float8_problem(device):
        raise cannot_use(f"{who}.fp8=true", problem)
    if dtype != "bfloat16":
        raise ConfigError(
            f"{who}.fp8=true rounds bfloat16 weights, and {who}.dtype is {dtype}: set it to "
            "bfloat16, or leave fp8 out"
        )


def _recipe() -> Any:
    """Return torchao's description of what is rounded, and how."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _is_rounded(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear) and not any(n % MULTIPLE for n in module.weight.shape)


def to_float8(model: nn.Module) -> None:
    """Let the linear layers of a model's blocks compute in float8, in place.

    Args:
        model: a causal LM, in bfloat16, on its GPU.

    Raises:
        ConfigError: if no layer can.
    """
    from torchao.quantization import quantize_

    layers = find_decoder(model).layers
    if not any(_is_rounded(module, "") for module in layers.modules()):
        raise ConfigError(
            f"teacher.fp8=true: {type(model).__name__} has no linear layer whose sizes are "
            f"multiples of {MULTIPLE} in its blocks: leave fp8 out"
        )
    quantize_(layers, _recipe(), filter_fn=_is_rounded)
    model.requires_grad_(False)


@dataclass(frozen=True)
class States:
    """Hidden states of a model at some prompts: by block, (tokens, d) float32."""

    by_block: dict[int, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, prompts: Sequence[list[int]], blocks: Sequence[int]) -> States:
        """Run a model, in evaluation mode, on prompts of token ids, one after another."""
        decoder = find_decoder(model)
        seen: dict[int, list[Tensor]] = {block: [] for block in blocks}

        def keep(block: int, h: Tensor) -> None:
            seen[block].append(h.flatten(0, -2).float())

        with watch(decoder, seen, decoder.num_layers, keep):
            for prompt in prompts:
                decoder.forward(torch.tensor([prompt], device=decoder.root.device))
        return cls({block: torch.cat(parts) for block, parts in seen.items()})


@dataclass(frozen=True)
class Distance:
    """How far two models' states are apart: by layer, ||a - b|| / ||b|| and 1 - the mean cosine."""

    relative: list[float]
    angle: list[float]

    @classmethod
    def between(cls, ours: States, theirs: States, pairs: Sequence[tuple[int, int]]) -> Distance:
        """Compare states of ``ours`` and ``theirs`` by pairs of their blocks."""
        relative, angle = [], []
        for mine, other in pairs:
            a, b = ours.by_block[mine], theirs.by_block[other]
            relative.append(((a - b).norm() / b.norm()).item())
            angle.append(1 - nn.functional.cosine_similarity(a, b, dim=-1).mean().item())
        return cls(relative, angle)

    @property
    def mean(self) -> float:
        """The mean of the relative distances."""
        return sum(self.relative) / len(self.relative)


LARGE = 0.1
"""Share of the distance to the student above which float8's error is called large."""


def describe(error: Distance, to_student: Distance | None) -> list[str]:
    """Return what a run says of float8's error: one line, and a note if it is large.

    Args:
        error: between the teacher in float8 and as it was.
        to_student: between the student and the teacher as it was; None: not known.
    """
    lines = [
        f"teacher in float8: its states are off by {error.mean:.2%} of their norm (mean of "
        f"{len(error.relative)} layers; at most {max(error.relative):.2%}), 1 - cosine at most "
        f"{max(error.angle):.1e}"
        + ("" if to_student is None else f"; the student is {to_student.mean:.2%} away")
    ]
    # A student that is the teacher itself, with another prompt, is at no distance at first.
    if to_student is not None and error.mean > LARGE * to_student.mean > 0:
        lines.append(
            f"note: that is {error.mean / to_student.mean:.0%} of the distance that is to be "
            "closed: the student learns the rounding too. Set teacher.fp8 to false for "
            "the last part of the training"
        )
    return lines

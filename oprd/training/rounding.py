"""Updates of 16-bit weights.

A bfloat16 number has 8 significant bits. An update below 1/512 of a weight is lost when the new
weight is rounded to the nearest number, at any step and in one direction after the other:
at a learning rate of 1e-5 most weights never change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from oprd import distributed
from oprd.config.optim import UPDATED_AT_ONCE

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")

SAMPLED = 1024
"""Numbers of a parameter that `UpdateWatch` looks at."""


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose new weights are rounded up or down at random, so that they are right on average.

    The probability of rounding up is the distance from the number below, in units of the distance
    between the two. Moments and the update itself are float32. The random bits depend on ``seed``,
    the step and the parameter's place alone, so that a resumed run draws the same, and ranks
    that hold the same weights round them alike.

    Args:
        params: parameters; those that are not bfloat16 are updated as `torch.optim.AdamW` does.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: seed of the random bits.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments stay float32, which torch would cast to the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name in MOMENTS if number in state_dict["state"] else ():
                ours = self.state[parameter]
                ours[name] = state_dict["state"][number][name].to(ours[name].device, torch.float32)

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
        step = state["step"].clone()
        tensors = (parameter, parameter.grad, *(state[name] for name in MOMENTS))
        locals_ = [_local(t) for t in tensors]
        generator = torch.Generator(locals_[0].device)
        generator.manual_seed(hash((self.seed, int(step), place)) % 2**63)
        flat = [t if t.is_contiguous() else t.contiguous() for t in locals_]
        for chunk in zip(*(t.view(-1).split(UPDATED_AT_ONCE) for t in flat), strict=True):
            weight, gradient, first, second = chunk
            wide = weight.float()
            adamw(
                [wide], [gradient.float()], [first], [second], [], [step.clone()],
                foreach=False, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False,
            )  # fmt: skip
            if weight.dtype == torch.bfloat16:
                stochastic_round_(wide, generator)
            weight.copy_(wide)
        for ours, theirs in zip(locals_, flat, strict=True):
            if ours is not theirs:
                ours.copy_(theirs)
        state["step"] += 1


def stochastic_round_(wide: Tensor, generator: torch.Generator) -> None:
    """Round float32 numbers in place to bfloat16 numbers, up or down at random.

    Numbers that are bfloat16 numbers already, infinity among them, stay as they are.
    """
    bits = wide.view(torch.int32)
    noise = torch.randint(
        1 << 16, wide.shape, generator=generator, dtype=torch.int32, device=wide.device
    )
    bits.add_(noise).bitwise_and_(-(1 << 16))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class UpdateWatch:
    """Measures how many weights a step leaves as they were although they have a gradient.

    It looks at some numbers of each trained bfloat16 parameter. Without such parameters it does
    nothing, nor where they are rounded stochastically.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rounding: str = "nearest") -> None:
        trained = [p for p in parameters if p.requires_grad and p.dtype == torch.bfloat16]
        self.parameters = trained if rounding == "nearest" else []
        self.active = bool(self.parameters)
        self.share: float | None = None
        self.seen: list[float] = []

    def _sample(self, gradients: bool = False) -> Tensor:
        tensors = [p.grad if gradients else p for p in self.parameters if p.grad is not None]
        samples = []
        for tensor in map(_local, tensors):
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].clone())
        device = _local(self.parameters[0]).device
        return torch.cat(samples) if samples else torch.zeros(0, device=device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Return a context in which the optimizer makes its step; then ``share`` is up to date."""
        if not self.active:
            yield
            return
        before, moved = self._sample(), self._sample(gradients=True) != 0
        yield
        unchanged = (self._sample() == before) & moved
        counts = [float(unchanged.sum()), float(moved.sum())]
        lost, of = distributed.sum_over_ranks(counts, before.device)
        self.share = lost / of if of else None

    def metrics(self) -> dict[str, float]:
        """Return ``actor/unchanged_weights``, the share; empty if there is none.

        Warn, once, if in five steps on average more than half of the weights stayed the same.
        """
        if self.share is None:
            return {}
        if len(self.seen) < 5:
            self.seen.append(self.share)
            mean = sum(self.seen) / len(self.seen)
            if len(self.seen) == 5 and mean > 0.5:
                logger.warning(
                    f"a step leaves {mean:.0%} of the student's bfloat16 weights as they are "
                    "(actor/unchanged_weights): updates below half the distance to the next "
                    "bfloat16 number round away. Set optim.rounding=stochastic, or keep float32 "
                    "weights: student.dtype=float32 with autocast=bfloat16"
                )
        return {"actor/unchanged_weights": self.share}

"""The LM head of a Hugging Face model, as the output-space losses use it.

Shapes: m rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Configuration entries by which a model changes its logits after the head in ways not known here.
UNKNOWN_SCALES = (
    "logit_scale",
    "logits_scaling",
    "mup_width_multiplier",
)


@dataclass(frozen=True)
class LMHead:
    """Weight (V, d), bias (V,) or None, and the cap that Gemma puts on logits, if any.

    Logits are float32 from the accumulator on: rounded to bfloat16 first, they would be off by up
    to a percent, and their gradient by more.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> LMHead:
        """The head of a causal LM.

        Raises:
            ValueError: if the model has none, or scales its logits in a way not known here.
        """
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no LM head: output-space losses need one")
        config = model.config.get_text_config()
        for name in UNKNOWN_SCALES:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{type(model).__name__} scales its logits ({name}={getattr(config, name)}), "
                    "which the chunked losses do not do; use the materialised ones"
                )
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, getattr(head, "bias", None), cap)

    def products(self, states_md: Tensor) -> Tensor:
        """(m, V) W h, float32 (float64 for float64 states)."""
        states, weight = states_md.detach(), self.weight.detach()
        if states.dtype == weight.dtype == torch.float32 or states.dtype == torch.float64:
            return states @ weight.to(states.dtype).T
        if states.is_cuda and states.dtype == weight.dtype:
            return torch.mm(states, weight.T, out_dtype=torch.float32)
        return states.float() @ weight.float().T

    def logits(self, products_mV: Tensor) -> Tensor:
        """From the products: bias and cap."""
        logits = products_mV if self.bias is None else products_mV + self.bias.detach()
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def backward_states(self, d_products_mV: Tensor) -> Tensor:
        """(m, d) gradient with respect to the states."""
        return d_products_mV @ self.weight.detach().to(d_products_mV.dtype)

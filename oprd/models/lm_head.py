"""The LM head of a Hugging Face model, as the output-space losses use it.

Shapes: m rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from oprd.errors import ConfigError

# Configuration entries by which a model multiplies its logits after the head (1), or divides them
# (-1): Cohere's, Falcon-H1's and Granite's.
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# Entries that cap them: Gemma's, RecurrentGemma's and xLSTM's.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LMHead:
    """The weight, bias, scale and logit cap of an LM head.

    `oprd.models.self_check.check_head` checks that a model does no more to its logits.

    Logits are float32 from the accumulator on. Rounded to bfloat16 first, they would be off by up
    to a percent, and their gradient by more.

    Attributes:
        weight: (V, d).
        bias: (V,) or None.
        softcap: the cap that Gemma applies to logits; None: no cap.
        scale: what the model multiplies its logits by.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: Any) -> LMHead:
        """Return the LM head of a causal LM.

        Raises:
            ValueError: if the model has no LM head.
        """
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no LM head: output-space losses need one")
        return cls(head.weight, getattr(head, "bias", None), *_after_head(model.config))

    @classmethod
    def tied(cls, backbone: Any) -> LMHead | None:
        """Return the head of a model whose backbone is there alone: its embeddings, if tied."""
        if not backbone.config.get_text_config().tie_word_embeddings:
            return None
        return cls(backbone.get_input_embeddings().weight, None, *_after_head(backbone.config))

    def operand(self, states: Tensor) -> Tensor:
        """Return the weight in the dtype that `multiply` needs for these states.

        The result may be a large copy: make it once for all chunks of a call.
        """
        weight = self.weight.detach()
        on_tensor_cores = states.is_cuda and states.dtype == weight.dtype
        return weight if on_tensor_cores else weight.to(wide_dtype(states.dtype))

    def products(self, states_md: Tensor, operand_Vd: Tensor) -> Tensor:
        """Return the products of states and weight, (m, V) in `wide_dtype`.

        Args:
            states_md: (m, d) hidden states.
            operand_Vd: (V, d), from `operand`.
        """
        return multiply(states_md, operand_Vd.T)

    def backward_states(self, d_products_mV: Tensor, operand_Vd: Tensor) -> Tensor:
        """Return the gradient of the states, (m, d), from the gradient of their products."""
        return multiply(d_products_mV, operand_Vd)

    def backward_states_of(
        self, d_products_mk: Tensor, tokens_mk: Tensor, operand_Vd: Tensor
    ) -> Tensor:
        """Return the gradient of the states, (m, d), from that of k products in each row."""
        weights_mkd = operand_Vd[tokens_mk].to(d_products_mk.dtype)
        return torch.einsum("mk,mkd->md", d_products_mk, weights_mkd)

    def logits_(self, products: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply bias, scale and cap to products in place and return them, now logits.

        Args:
            products: (m, V), or (m, k) with the ``bias`` of their k tokens.
        """
        bias = self.bias if bias is None else bias
        if bias is not None:
            products += bias.detach()
        if self.scale != 1:
            products *= self.scale
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of logits by products, a number if it is the same for all."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.scale)


class HeadRows:
    """The logits that a head makes of M rows of states, formed for a few rows at a time.

    Attributes:
        head: the LM head.
        states_Md: (M, d) hidden states, each at the position that predicts a token.
        width: the number of tokens that have logits; at most the head's V.
    """

    def __init__(self, head: LMHead, states_Md: Tensor, width: int | None = None) -> None:
        self.head, self.states_Md = head, states_Md.detach()
        vocab = head.weight.shape[0]
        self.width = vocab if width is None else min(width, vocab)
        self.operand_Vd = head.operand(states_Md)

    def logits(self, at: slice) -> Tensor:
        """Return the logits of some rows, (m, V) in `wide_dtype`; the caller may overwrite them."""
        return self.head.logits_(self.head.products(self.states_Md[at], self.operand_Vd))

    def logits_of(self, at: slice, tokens_mk: Tensor) -> Tensor:
        """Return the logits of k tokens in each row, (m, k), without those of the others."""
        states, weights = self.states_Md[at], self.operand_Vd[tokens_mk]
        wide = wide_dtype(states.dtype)
        products = torch.einsum("md,mkd->mk", states.to(wide), weights.to(wide))
        bias = None if self.head.bias is None else self.head.bias[tokens_mk]
        return self.head.logits_(products, bias)


def _after_head(config: PretrainedConfig) -> tuple[float | None, float]:
    """Return `LMHead.softcap` and `LMHead.scale` of a configuration."""
    text, scale = config.get_text_config(), 1.0
    for name, power in SCALES.items():
        scale *= (getattr(text, name, None) or 1.0) ** power
    caps = [cap for name in CAPS if (cap := getattr(text, name, None))]
    return next(iter(caps), None), scale


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums of products of ``dtype``: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, accumulated and returned in `wide_dtype`.

    On a GPU a 16-bit ``b`` keeps its dtype so that tensor cores are used, and ``a`` is rounded to
    that dtype.
    """
    wide = wide_dtype(b.dtype)
    if a.is_cuda and b.dtype != wide:
        return torch.mm(a.to(b.dtype), b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b in place, rounded as in `multiply`, with no second such tensor."""
    if a.is_cuda and b.dtype != total.dtype:
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def copy_lm_head(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Copy the teacher's LM head into the student.

    Raises:
        ConfigError: if the heads differ in shape, or if the student's head is tied to its
            embeddings.
    """
    ours, theirs = student.get_output_embeddings(), teacher.get_output_embeddings()
    if ours.weight is student.get_input_embeddings().weight:
        raise ConfigError(
            "distill.init_head_from_teacher: the student's head is tied to its embeddings, which "
            "OPRD trains. Leave the option off"
        )
    if ours.weight.shape != theirs.weight.shape:
        raise ConfigError(
            f"distill.init_head_from_teacher: the student's head is {tuple(ours.weight.shape)}, "
            f"the teacher's {tuple(theirs.weight.shape)}: they must be alike"
        )
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        if getattr(ours, "bias", None) is not None and getattr(theirs, "bias", None) is not None:
            ours.bias.copy_(theirs.bias)

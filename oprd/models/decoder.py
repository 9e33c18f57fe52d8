"""The parts of a Hugging Face decoder that OPRD needs: its blocks and its final norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from oprd.models.without_adapter import WithoutAdapter

LAYER_NAMES = ("layers", "h")
NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Decoder:
    """A backbone (no LM head) with its blocks and final norm, by attribute name.

    ``root`` is the whole model that it was found in. ``running`` is entered while it runs.
    """

    backbone: Any  # an nn.Module; its attributes are the model's own
    layers_name: str
    norm_name: str
    root: Any
    running: Callable[[], AbstractContextManager] = nullcontext

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.backbone, self.layers_name)

    @property
    def norm(self) -> nn.Module:
        return getattr(self.backbone, self.norm_name)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """d, the hidden size."""
        return self.backbone.config.get_text_config().hidden_size

    def state_module(self, block: int, depth: int) -> nn.Module:
        """What puts out entry ``block`` + 1 of ``hidden_states`` in a model of ``depth`` layers:
        the block, or for the last one the final norm."""
        return self.norm if block == depth - 1 else self.layers[block]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Runs the backbone and returns what it does for its last hidden state, (B, T, d).

        Args and raises: see `model_inputs`.
        """
        with self.running():
            return self._run(
                **model_inputs(input_ids, attention_mask, position_ids), use_cache=False
            ).last_hidden_state

    @property
    def _run(self) -> Callable[..., Any]:
        """What runs the backbone. Under FSDP2 its parameters are gathered by the root, whose own
        ``forward`` would go on to the LM head: so the root gets a method that ends before it."""
        root, sharded = self.root, isinstance(self.root, FSDPModule)
        if root is self.backbone or not sharded:
            return self.backbone
        if not hasattr(root, "oprd_run_backbone"):
            root.oprd_run_backbone = lambda **inputs: self.backbone(**inputs)
            register_fsdp_forward_method(root, "oprd_run_backbone")
        return root.oprd_run_backbone


def model_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> dict[str, Tensor | None]:
    """What to call a model with, padded or packed.

    Positions count the tokens that ``attention_mask`` keeps, so that padding on either side changes
    nothing.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 for padding; None: no padding.
        position_ids: (1, T) int64, of sequences packed in one row: beginning at 0 for each, which
            is how transformers tells them apart. None: a row is a sequence.

    Raises:
        ValueError: if sequences are packed in more than one row (FlashAttention does not tell them
            apart), or there is a mask too (nothing does).
    """
    if position_ids is None:
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    elif attention_mask is not None:
        raise ValueError(
            "packed sequences (position_ids) go without an attention_mask, under which they would "
            "see each other: pass None"
        )
    elif len(input_ids) != 1:
        raise ValueError(
            f"packed sequences (position_ids) are one row (1, T), got {tuple(input_ids.shape)}: "
            "flatten input_ids, response_mask and position_ids"
        )
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
    }  # fmt: skip


def find_decoder(model: Any) -> Decoder:
    """The decoder inside a Hugging Face model, a backbone or a PEFT wrapper of either.

    Raises:
        ValueError: if no list of blocks followed by a norm is found where Llama, Qwen, Phi, Gemma,
            GPT-2, GPT-NeoX and their like have it.
    """
    if isinstance(model, WithoutAdapter):
        return replace(find_decoder(model.adapted), running=model.running)
    root = model
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = [n for n in LAYER_NAMES if isinstance(getattr(backbone, n, None), nn.ModuleList)]
    norms = [n for n in NORM_NAMES if isinstance(getattr(backbone, n, None), nn.Module)]
    if not layers or not norms:
        raise ValueError(
            f"{type(backbone).__name__} is not a decoder that oprd knows: expected a ModuleList "
            f"called {' or '.join(LAYER_NAMES)} and a final norm called {' or '.join(NORM_NAMES)}, "
            f"found {[name for name, _ in backbone.named_children()]}"
        )
    return Decoder(backbone, layers[0], norms[0], root)


@contextmanager
def watch(
    decoder: Decoder, blocks: Iterable[int], depth: int, see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While open, forward passes of ``decoder``, however it is called, hand over hidden states.

    Args:
        blocks: counted from 0, see `Decoder.state_module`.
        depth: the model's layers, of which ``decoder`` may have only the first.
        see: called with a block's number and its states (B, T, d).
    """

    def hook(block: int) -> Callable[..., None]:
        return lambda _module, _args, output: see(block, first_tensor(output))

    handles = []
    try:
        for block in blocks:
            module = decoder.state_module(block, depth)
            handles.append(module.register_forward_hook(hook(block)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(decoder: Decoder, num_layers: int) -> Decoder:
    """The same decoder without the blocks after the first ``num_layers``, and, if any are dropped,
    without the final norm, which nothing of it would reach.

    The modules that remain are shared with ``decoder``, which is left as it was: dropping the
    reference to it frees the rest.
    """
    if num_layers == decoder.num_layers:
        return decoder
    backbone = copy.copy(decoder.backbone)
    backbone._modules = dict(decoder.backbone._modules)
    backbone._modules[decoder.layers_name] = nn.ModuleList(decoder.layers[:num_layers])
    backbone._modules[decoder.norm_name] = nn.Identity()
    backbone.config = copy.deepcopy(decoder.backbone.config)
    text_config = backbone.config.get_text_config()
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = text_config.layer_types[:num_layers]
    return replace(decoder, backbone=backbone, root=backbone)


def first_tensor(output: Tensor | tuple) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def replace_first(output: Tensor | tuple, h: Tensor) -> Tensor | tuple:
    """``output`` with other hidden states."""
    return h if isinstance(output, torch.Tensor) else (h, *output[1:])

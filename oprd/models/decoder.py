"""The parts of a Hugging Face decoder that OPRD needs: its blocks and its final norm."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from oprd.errors import ConfigError
from oprd.models.attention import is_flash, varlen_inputs
from oprd.models.without_adapter import WithoutAdapter

LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "layer_norm",
    "embedding_norm", "ln_out", "out_norm", "layernorm",
)  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """A backbone (a model without its LM head), its blocks and its final norm.

    Attributes:
        backbone: the backbone module.
        layers_name, norm_name: names of its attributes that hold the blocks and the final norm.
        root: the whole model that contains the backbone.
        running: makes the context in which `forward` runs the backbone.
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
        """Return the module whose output is entry ``block`` + 1 of ``hidden_states``.

        This is the block itself, or the final norm for the last block of a model of ``depth``
        layers.
        """
        return self.norm if block == depth - 1 else self.layers[block]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the backbone and return its last hidden state, (B, T, d).

        See `model_inputs` for the arguments and the errors raised.
        """
        inputs = self.inputs(input_ids, attention_mask, position_ids)
        with self.running():
            return self.run(**inputs, use_cache=False).last_hidden_state

    def inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """Build the keyword arguments of a forward pass of this model, see `model_inputs`.

        For packed sequences FlashAttention also gets where they begin and end.
        """
        inputs: dict[str, Any] = model_inputs(input_ids, attention_mask, position_ids)
        attention = getattr(self.backbone.config, "_attn_implementation", None)
        if position_ids is not None and is_flash(attention) and _takes_more(self.backbone.forward):
            inputs |= varlen_inputs(position_ids)
        return inputs

    @property
    def run(self) -> Callable[..., Any]:
        """The callable that runs the backbone; call it within `running`.

        Under FSDP2 the root gathers the backbone's parameters, but the root's own ``forward`` would
        also run the LM head. The root therefore gets a method that stops before the head.
        """
        root, sharded = self.root, isinstance(self.root, FSDPModule)
        if root is self.backbone or not sharded:
            return self.backbone
        if not hasattr(root, "oprd_run_backbone"):
            root.oprd_run_backbone = lambda **inputs: self.backbone(**inputs)
            register_fsdp_forward_method(root, "oprd_run_backbone")
        return root.oprd_run_backbone


def _takes_more(forward: Callable[..., Any]) -> bool:
    """Return whether a function passes on keyword arguments that it does not know."""
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def model_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Build the keyword arguments of a forward pass, for padded or packed sequences.

    Positions count the tokens that ``attention_mask`` keeps, so that padding on either side does
    not change them.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 for padding; None: no padding.
        position_ids: (1, T) int64, for sequences packed in one row. The positions of each sequence
            begin at 0, by which transformers tells the sequences apart. None: every row is one
            sequence.

    Raises:
        ValueError: if sequences are packed in more than one row (FlashAttention would not keep them
            apart), or if packed sequences come with a mask (no attention implementation would).
    """
    if position_ids is None:
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    elif attention_mask is not None:
        raise ValueError(
            "packed sequences (position_ids) must be passed without an attention_mask: with a mask "
            "they would see each other. Pass attention_mask=None"
        )
    elif len(input_ids) != 1:
        raise ValueError(
            "packed sequences (position_ids) must be one row (1, T), got "
            f"{tuple(input_ids.shape)}: flatten input_ids, response_mask and position_ids"
        )
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }


def find_decoder(model: Any) -> Decoder:
    """Find the decoder inside a Hugging Face model, a backbone, or a PEFT wrapper of either.

    Raises:
        ConfigError: if the model has no list of blocks and final norm under the names that Llama,
            Qwen, Phi, Gemma, GPT-2, GPT-NeoX, Mamba, LFM2 and similar models use.
            `oprd.models.self_check` checks that the norm found is the final one.
    """
    if isinstance(model, WithoutAdapter):
        return replace(find_decoder(model.adapted), running=model.running)
    root = model
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    found: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    # Where a model has its backbone and the module that it calls its decoder differ (Llama 4).
    for backbone in (found, getattr(model, "model", None)):
        layers = [n for n in LAYER_NAMES if isinstance(getattr(backbone, n, None), nn.ModuleList)]
        norms = [n for n in NORM_NAMES if isinstance(getattr(backbone, n, None), nn.Module)]
        if layers and norms:
            return Decoder(backbone, layers[0], norms[0], root)
    raise ConfigError(
        f"{type(found).__name__} is not a decoder that oprd knows: expected a ModuleList called "
        f"{' or '.join(LAYER_NAMES)} and a final norm called {' or '.join(NORM_NAMES)}, found "
        f"{[name for name, _ in found.named_children()]}"
    )


@contextmanager
def watch(
    decoder: Decoder, blocks: Iterable[int], depth: int, see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Pass hidden states to ``see`` during forward passes of ``decoder`` within this context.

    This works however the decoder is called.

    Args:
        decoder: the decoder to watch.
        blocks: blocks, counted from 0, see `Decoder.state_module`.
        depth: number of layers of the full model; ``decoder`` may have only the first of them.
        see: called with the number of a block and its states (B, T, d).
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
    """Return a decoder with the first ``num_layers`` blocks only.

    The configuration stays that of the whole model, from which modules derive sizes. The modules
    are shared with ``decoder``, which is not changed. Dropping all references to ``decoder`` frees
    the blocks that were cut off.

    Not every model runs so: see `oprd.models.self_check.same_states`.
    """
    if num_layers == decoder.num_layers:
        return decoder
    backbone = copy.copy(decoder.backbone)
    backbone._modules = dict(decoder.backbone._modules)
    backbone._modules[decoder.layers_name] = nn.ModuleList(decoder.layers[:num_layers])
    return replace(decoder, backbone=backbone, root=backbone)


def first_tensor(output: Tensor | tuple) -> Tensor:
    """Return the hidden states of a block's output: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def replace_first(output: Tensor | tuple, h: Tensor) -> Tensor | tuple:
    """Return ``output`` with its hidden states replaced by ``h``."""
    return h if isinstance(output, torch.Tensor) else (h, *output[1:])

"""LoRA students: a low-rank PEFT adapter is trained beside frozen weights.

The adapter sits inside the model's own linear layers, so a LoRA student is used like any other:
taps, `generate`, gradient checkpointing and the LM head all work. `WithoutAdapter` is the same
model with its adapter off, a teacher that takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oprd.config import LoraConfig
from oprd.errors import ConfigError, need_package

ADAPTER = "default"
"""The name that PEFT gives to a model's only adapter."""

PLAIN = (nn.Linear.forward, Conv1D.forward)


def add_adapter(model: PreTrainedModel, cfg: LoraConfig, seed: int = 0) -> None:
    """Add a new float32 adapter to ``model``, and freeze all other parameters.

    Args:
        model: the model, changed in place.
        cfg: the adapter's configuration; its ``rank`` is not None.
        seed: seed of the adapter's weights, so that every rank draws the same weights.

    Raises:
        ConfigError: if PEFT is missing, or if ``cfg.target_modules`` names no module or one that is
            not a linear layer inside a block.
    """
    need_package("peft", "peft", "student.lora")
    import peft

    from oprd.models.decoder import find_decoder

    assert cfg.rank is not None
    targets = cfg.target_modules
    if targets == "all-linear":
        targets = linear_layers(model)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(
                peft.LoraConfig(
                    r=cfg.rank,
                    lora_alpha=cfg.alpha,
                    lora_dropout=cfg.dropout,
                    target_modules=targets,
                    task_type="CAUSAL_LM",
                    base_model_name_or_path=model.name_or_path,
                ),
                model,
                ADAPTER,
            )
        except ValueError as error:
            raise ConfigError(
                f"student.lora.target_modules={cfg.target_modules}: {error}"
            ) from error
    blocks = set(find_decoder(model).layers.modules())
    outside = [name for name, m in model.named_modules() if _has_adapter(m) and m not in blocks]
    if outside:
        raise ConfigError(
            f"student.lora.target_modules={targets} names {', '.join(outside)}, outside the "
            "decoder's blocks: name linear layers inside the blocks (q_proj, down_proj, ..), or "
            "use all-linear"
        )
    _share_adapters(model)
    model.train(model.training)  # PEFT creates its layers (dropout) in training mode
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would round a small learning rate's steps away
            parameter.data = parameter.data.float()


def _share_adapters(model: nn.Module) -> None:
    """Give layers that share a weight (Zamba's blocks) one adapter, as merging has one weight."""
    first: dict[int, Any] = {}
    for module in filter(_has_adapter, model.modules()):
        base: Any = module
        weight = getattr(base.get_base_layer(), getattr(base, "parameter_name", "weight"))
        owner = first.setdefault(id(weight), base)
        base.lora_A, base.lora_B = owner.lora_A, owner.lora_B


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers inside a model's blocks that an adapter fits.

    Left out are subclasses with a forward pass of their own (a router that returns a tuple, in
    Llama 4) and the output projections of Mamba's mixers, whose kernels read the weight itself.

    Raises:
        ConfigError: if there is none.
    """
    from oprd.models.decoder import find_decoder

    modules = dict(model.named_modules())
    blocks = set(find_decoder(model).layers.modules())

    def fits(name: str, module: nn.Module) -> bool:
        parent, _, own = name.rpartition(".")
        mixer = modules[parent]
        is_mamba = isinstance(getattr(mixer, "conv1d", None), nn.Conv1d) and hasattr(mixer, "D")
        return (
            module in blocks
            and type(module).forward in PLAIN
            and not (is_mamba and own == "out_proj")
        )

    names = [name for name, module in modules.items() if fits(name, module)]
    if not names:
        raise ConfigError(
            f"student.lora.target_modules=all-linear: the blocks of {type(model).__name__} have no "
            "linear layer that an adapter fits. Train all weights (student.lora.rank=null)"
        )
    return names


def check_targets(config: PretrainedConfig, cfg: LoraConfig) -> None:
    """Check, without loading weights, that an adapter can be added to a model.

    Raises:
        ConfigError: see `add_adapter`.
    """
    with torch.device("meta"):
        add_adapter(AutoModelForCausalLM.from_config(config), cfg)


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model has a LoRA adapter."""
    return any(map(_has_adapter, model.modules()))


def _has_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight")


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the model's state dict with the adapter merged into the weights.

    The names are those of the model without an adapter. Tensors are merged one at a time, and
    sharded tensors stay sharded. A tensor with two names (a head tied to the embeddings) is yielded
    once, under its first name.
    """
    adapted = {name: m for name, m in model.named_modules() if _has_adapter(m)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if _of_adapter(name):
            continue
        for delta in _deltas(name, adapted):
            tensor = (tensor.detach() + delta.detach()).to(tensor.dtype)
        yield name.replace(".base_layer", ""), tensor


def plain_names(model: nn.Module) -> dict[str, torch.Size]:
    """Return names and shapes of the weights that `merged_weights` yields, and of tied ones."""
    return {
        name.replace(".base_layer", ""): tensor.shape
        for name, tensor in model.state_dict().items()
        if not _of_adapter(name)
    }


def _of_adapter(name: str) -> bool:
    return any(part in name for part in (".lora_A.", ".lora_B."))


def _deltas(name: str, adapted: dict[str, Any]) -> Iterator[Tensor]:
    """Yield what the adapter adds to a weight.

    The weight of a linear layer L is L.base_layer.weight. Of experts in one tensor E, PEFT adapts
    each parameter by a wrapper, and wraps the wrappers: E.base_layer.base_layer.gate_up_proj.
    """
    owner, inside, rest = name.partition(".base_layer.")
    while inside:
        own = rest.rpartition("base_layer.")[2]
        if owner in adapted and own == getattr(adapted[owner], "parameter_name", "weight"):
            yield adapted[owner].get_delta_weight(ADAPTER)
        within, inside, rest = rest.partition("base_layer.")
        owner = f"{owner}.base_layer"
        if within:
            return


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's full tensors, by the names that PEFT uses in files.

    This is a collective operation if the tensors are sharded.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER).items()
    return {
        f"base_model.model.{name}": (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
        for name, t in tensors
    }


def save_adapter(model: Any, weights: dict[str, Tensor], directory: Path) -> None:
    """Write the adapter so that ``PeftModel.from_pretrained(base, directory)`` loads it.

    Args:
        model: the model with the adapter.
        weights: the result of `adapter_weights`.
        directory: created if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    owners = {t.data_ptr(): name for name, t in reversed(weights.items())}
    contiguous = {  # a file holds no tensor twice
        name: t.contiguous() if owners[t.data_ptr()] == name else t.clone()
        for name, t in weights.items()
    }
    save_file(contiguous, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(directory, inference_mode=True)

"""LoRA students: a low-rank adapter is trained beside frozen weights (PEFT does the work).

The adapter sits inside the model's own linear layers, so a LoRA student is used as any other is:
taps, `generate`, gradient checkpointing, LM head. `WithoutAdapter` is the same model with its
adapter off, a teacher that takes no memory.
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

from oprd.config import LoraConfig
from oprd.errors import ConfigError, need_package

ADAPTER = "default"
"""PEFT's name of a model's only adapter."""


def add_adapter(model: PreTrainedModel, cfg: LoraConfig, seed: int = 0) -> None:
    """Put a new adapter into ``model``, in float32, and freeze everything else.

    Args:
        cfg: its ``rank`` is not None.
        seed: of the adapter's weights, so that every rank draws the same ones.

    Raises:
        ConfigError: if PEFT is missing or ``cfg.target_modules`` names no linear layer of a block.
    """
    need_package("peft", "peft", "student.lora")
    import peft

    from oprd.models.decoder import find_decoder

    assert cfg.rank is not None
    targets = cfg.target_modules
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
            raise ConfigError(f"student.lora.target_modules={targets}: {error}") from error
    blocks = set(find_decoder(model).layers.modules())
    outside = [name for name, m in model.named_modules() if _has_adapter(m) and m not in blocks]
    if outside:
        raise ConfigError(
            f"student.lora.target_modules={targets} names {', '.join(outside)}, outside the "
            "decoder's blocks: name linear layers inside them (q_proj, down_proj, ..), or take "
            "all-linear"
        )
    model.train(model.training)  # PEFT's new layers (dropout) come in training mode
    for parameter in model.parameters():
        if parameter.requires_grad:  # bfloat16 would round a small learning rate's steps away
            parameter.data = parameter.data.float()


def check_targets(config: PretrainedConfig, cfg: LoraConfig) -> None:
    """Check, without weights, that an adapter fits a model.

    Raises:
        ConfigError: as `add_adapter`.
    """
    with torch.device("meta"):
        add_adapter(AutoModelForCausalLM.from_config(config), cfg)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has a LoRA adapter."""
    return any(map(_has_adapter, model.modules()))


def _has_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight")


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of a state dict in which the adapter is part of the weights, under the names
    that the model has without one. Merged one at a time; sharded tensors stay sharded. A tensor
    that has two names (a head tied to the embeddings) comes once, under the first.
    """
    adapted = {name: m for name, m in model.named_modules() if _has_adapter(m)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner, inside, rest = name.partition(".base_layer.")
        if inside and owner in adapted:
            if rest == "weight":
                delta = adapted[owner].get_delta_weight(ADAPTER).detach()
                tensor = (tensor.detach() + delta).to(tensor.dtype)
            yield f"{owner}.{rest}", tensor
        elif not any(part in name for part in (".lora_A.", ".lora_B.")):
            yield name, tensor


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, whole, as PEFT's files name them. Collective if they are sharded."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=ADAPTER).items()
    return {
        f"base_model.model.{name}": (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
        for name, t in found
    }


def save_adapter(model: Any, weights: dict[str, Tensor], directory: Path) -> None:
    """Write the adapter so that ``PeftModel.from_pretrained(base, directory)`` loads it.

    Args:
        model: the adapted model.
        weights: its `adapter_weights`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: t.contiguous() for name, t in weights.items()}
    save_file(contiguous, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(directory, inference_mode=True)

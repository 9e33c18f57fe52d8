"""FSDP2 for Hugging Face decoders: one shard group per decoder layer, and a root for the rest.

Gradients are summed over ranks, not averaged, since losses are divided by global token counts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from oprd import distributed
from oprd.config.fsdp import FsdpConfig
from oprd.errors import ConfigError


def make_mesh(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """Arrange all ranks in a mesh: one dimension, or (replicas, ranks that share a replica)."""
    ranks = dist.get_world_size()
    if shard_size is None or shard_size == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    shape = (ranks // shard_size, shard_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: Any,
    layers: Iterable[nn.Module],
    cfg: FsdpConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    cpu_offload: bool = False,
) -> None:
    """Shard a model in place, and copy rank 0's weights and buffers to all ranks.

    Args:
        model: a decoder on the CPU, with or without LM head, possibly cut to fewer layers. On other
            ranks than 0 its weights may have any values (`oprd.models.loading.empty_model`).
        layers: the model's decoder layers, each of which becomes a shard group.
        cpu_offload: keep the shards in main memory.
    """
    # A tap's output is a view of the states, which is safe because nothing writes to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    source = {name: tensor.detach() for name, tensor in _tensors(model) if distributed.rank() == 0}
    policy = MixedPrecisionPolicy(
        param_dtype=None if cfg.param_dtype is None else getattr(torch, cfg.param_dtype),
        reduce_dtype=getattr(torch, cfg.reduce_dtype),
    )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    check_no_shared_weights(layers)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for layer in layers:
        fully_shard(layer, reshard_after_forward=cfg.reshard_after_forward, **options)
    # The root's own weights (embeddings, final norm, head) are used at both ends of a forward
    # pass, and after it by losses that compute logits themselves.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Plain sums: gloo has no reduction that also scales, only NCCL has.
            module.set_force_sum_reduction_for_comms(True)
    if dist.get_world_size() > 1:
        _fill(model, source, device)


def check_no_shared_weights(layers: Iterable[nn.Module]) -> None:
    """Check that no weight belongs to two blocks, which FSDP2 shards one by one.

    Raises:
        ConfigError: if one does, as in Zamba2. The message is the same on every rank.
    """
    owner: dict[int, int] = {}
    for block, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            first = owner.setdefault(id(parameter), block)
            if first != block:
                raise ConfigError(
                    f"blocks {first} and {block} share the weight {name}: FSDP2 can't shard a "
                    "model whose blocks share weights. Run it with fsdp.mode=never"
                )


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _fill(model: nn.Module, source: dict[str, Tensor], device: torch.device) -> None:
    """Copy every tensor from rank 0, one full tensor at a time."""
    for name, tensor in _tensors(model):
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if distributed.rank() == 0:
            whole.copy_(source.pop(name))
        dist.broadcast(whole, 0)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(
                whole, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
            tensor.to_local().copy_(part.to_local())
        else:
            tensor.copy_(whole)


def is_sharded(model: nn.Module) -> bool:
    """Return whether forward passes of ``model`` are collective."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def input_device(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs, which is the GPU even for offloaded shards."""
    weight = next(model.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def reshard(model: nn.Module) -> None:
    """Free the gathered weights after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Clip gradients to a global norm over all ranks' shards; return the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

"""FSDP2 on Hugging Face decoders: a shard group for each decoder layer, one root for the rest.

Gradients are added up over ranks and not divided: losses are normalised by global token counts.
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


def make_mesh(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """All ranks: in one dimension, or as (copies, ranks that share one)."""
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
    """Shard a model in place, with rank 0's weights and buffers.

    Args:
        model: a decoder with or without LM head, cut or whole, on the CPU. On ranks but 0 its
            weights may be anything (`oprd.models.loading.empty_model`).
        layers: its decoder layers, each of which becomes a shard group.
        cpu_offload: keep the shards in main memory.
    """
    # A tap's output is a view of the states; nothing writes to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    source = {name: tensor.detach() for name, tensor in _tensors(model) if distributed.rank() == 0}
    policy = MixedPrecisionPolicy(
        param_dtype=None if cfg.param_dtype is None else getattr(torch, cfg.param_dtype),
        reduce_dtype=getattr(torch, cfg.reduce_dtype),
    )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for layer in layers:
        fully_shard(layer, reshard_after_forward=cfg.reshard_after_forward, **options)
    # The root's own weights (embeddings, final norm, head) are used at both ends of a forward
    # pass, and after it by the losses that make their own logits.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Plain sums, which gloo has too; scaling inside the reduction is NCCL's.
            module.set_force_sum_reduction_for_comms(True)
    if dist.get_world_size() > 1:
        _fill(model, source, device)


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _fill(model: nn.Module, source: dict[str, Tensor], device: torch.device) -> None:
    """Every tensor from rank 0, one whole tensor at a time."""
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
    """Whether forward passes of ``model`` are collective."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs, also when its shards are offloaded."""
    weight = next(model.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def reshard(model: nn.Module) -> None:
    """Free gathered weights that no backward pass will free: after a forward without one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Clip to a global norm over all ranks' shards; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

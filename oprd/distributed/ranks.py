"""Ranks of a run: one process per device, started by torchrun, or a single process."""

from __future__ import annotations

import atexit
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_groups = count()


def init(device: str, group: bool = False, timeout_s: float | None = None) -> torch.device:
    """Join the process group if torchrun started several ranks, and return this rank's device.

    Args:
        group: create a process group even for a single process, which FSDP needs.
        timeout_s: timeout of the hang watchdog. Collectives get four times as long, since they may
            wait for a slower rank's whole phase and the watchdog's message says more than theirs.
            If None, they get 30 days.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        return chosen
    # Gloo beside NCCL, for tensors in main memory (offloaded shards, checkpoints).
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = timedelta(days=30) if timeout_s is None else timedelta(seconds=4 * timeout_s)
        store, rank, ranks = next(dist.rendezvous("env://"))
        # A new prefix: under an earlier group's keys, ranks would find that group's addresses.
        store = dist.PrefixStore(f"oprd/group/{next(_groups)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    elif group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return chosen


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, also before `init`."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined() -> bool:
    """Return whether this process is in a process group."""
    return dist.is_initialized()


def wait_for_all() -> None:
    """Wait until every rank has made this call."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a program's entry point and end the process with its exit code.

    With several ranks, the interpreter's own shutdown is skipped. During it, torch's threads have
    been seen to abort the process after all work was done ("terminate called without an active
    exception"), because Python ends threads that ask for its lock during shutdown.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    if world_size() == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def from_rank_0(value: Any) -> Any:
    """Return rank 0's value, which must be picklable, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum values element-wise over ranks, in float64 (float32 on MPS)."""
    if not dist.is_initialized():
        return list(values)
    dtype = torch.float64 if device.type != "mps" else torch.float32
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def max_over_ranks(value: float, device: torch.device) -> float:
    """Return the largest of the ranks' values."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(values: Sequence[T]) -> list[T]:
    """Return all ranks' values as one list in rank order, the same on every rank."""
    if not dist.is_initialized():
        return list(values)
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def sum_gradients(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Sum gradients over ranks. No average: losses are divided by global token counts.

    A parameter may have a gradient on some ranks only (an expert that no token of a rank chose):
    the others add zeros.
    """
    if not dist.is_initialized():
        return
    trained = [p for p in parameters if p.requires_grad]
    ranks = sum_over_ranks([float(p.grad is not None) for p in trained], device)
    for parameter, number in zip(trained, ranks, strict=True):
        if not number:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, differently on each rank."""
    own = seed + 1000003 * rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)

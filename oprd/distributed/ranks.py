"""Ranks: one process a device, started by torchrun; a single process otherwise."""

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
        group: make one of this process alone, too: FSDP needs it.
        timeout_s: of the watchdog for hung ranks. Collectives wait four times as long, since they
            may have to wait for a slower rank's whole phase and the watchdog says more than they
            do. None: they wait a month.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        return chosen
    # Gloo too beside NCCL: for what lives in main memory (offloaded shards, checkpoints).
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = timedelta(days=30) if timeout_s is None else timedelta(seconds=4 * timeout_s)
        store, rank, ranks = next(dist.rendezvous("env://"))
        # Names of its own: under an earlier group's, ranks would find that group's addresses.
        store = dist.PrefixStore(f"oprd/group/{next(_groups)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    elif group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return chosen


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks, also before `init`."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def wait_for_all() -> None:
    """Until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a program's entry point and end the process with its exit code.

    A rank of several ends without the interpreter's own end: there torch's threads, when they still
    have something to let go of, have been seen to abort it after all work was done ("terminate
    called without an active exception"; Python ends threads that ask for its lock too late).
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
    """Rank 0's value, which can be pickled, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum in double."""
    if not dist.is_initialized():
        return list(values)
    dtype = torch.float64 if device.type != "mps" else torch.float32
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of one value a rank."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def sum_tensor(tensor: Tensor) -> Tensor:
    """The ranks' tensors added up, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(values: Sequence[T]) -> list[T]:
    """Every rank's values, in the order of the ranks: the same list on all of them."""
    if not dist.is_initialized():
        return list(values)
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the ranks' gradients. Not divided: losses are normalised by global token counts."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch; ranks sample differently."""
    own = seed + 1000003 * rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)

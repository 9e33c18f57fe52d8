"""The environment of an engine's process, and the cores that it and the trainer compute on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

from oprd import distributed
from oprd.config import TrainConfig, VllmConfig
from oprd.distributed.device import num_cores

THREADS = "OMP_NUM_THREADS"
TORCHRUN = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "PET_")
"""Prefixes of the trainer's process-group variables, which the engine must not inherit."""


def local_ranks() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))


def engine_device(cfg: VllmConfig, device: torch.device) -> torch.device:
    """Return the device that the engine of the rank on ``device`` samples on."""
    if not cfg.own_gpus:
        return device
    return torch.device(device.type, (device.index or 0) + local_ranks())


def worker_environment(
    device: torch.device, rank: int, ranks: int, port: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment variables of an engine's process.

    Args:
        device: the device that it samples on.
        rank, ranks: rank and number of ranks in the tensor-parallel group, which meets at ``port``.
    """
    variables = {k: v for k, v in inherited.items() if not k.startswith(TORCHRUN)}
    # vLLM's sleep mode uses its own allocator, which can't be combined with expandable segments.
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        variables.pop(name, None)
    variables |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(device.index or 0),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Lengths are checked before the run, by student.context_length if it is given.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    # By default all ranks' engines are bound to the same cores. OMP_NUM_THREADS still applies.
    variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    variables.setdefault("VLLM_CPU_KVCACHE_SPACE", str(default_cpu_cache_gib()))
    variables.setdefault("VLLM_NO_USAGE_STATS", "1")
    return variables


def default_cpu_cache_gib() -> int:
    """Return the GiB of KV cache on a CPU: 1/8 of memory split over local ranks, from 1 to 16."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(16, int(memory / 8 / local_ranks())))


def work_at_once(cfg: TrainConfig, device: torch.device) -> bool:
    """Return whether trainer and engine compute on the same cores at the same time."""
    rollout = cfg.rollout
    return rollout.engine == "vllm" and rollout.staleness > 0 and device.type == "cpu"


def engine_threads(cfg: TrainConfig, device: torch.device) -> int | None:
    """Return the number of the engine's threads: half of the cores.

    None, which leaves it to vLLM, if trainer and engine take turns, if OMP_NUM_THREADS is set, or
    if there is only one core.
    """
    if not work_at_once(cfg, device) or THREADS in os.environ or num_cores() < 2:
        return None
    return num_cores() // 2


@contextlib.contextmanager
def cores_shared(cfg: TrainConfig, device: torch.device) -> Iterator[None]:
    """Leave the engine's threads their cores: the trainer computes on the others."""
    engine, before = engine_threads(cfg, device), torch.get_num_threads()
    if engine is not None:
        torch.set_num_threads(max(1, num_cores() - engine))
    try:
        yield
    finally:
        if engine is not None:
            torch.set_num_threads(before)


def threads_note(cfg: TrainConfig, device: torch.device) -> str | None:
    """Return a note about the cores for the user, if trainer and engine share them."""
    if not work_at_once(cfg, device):
        return None
    cores, engine = num_cores(), engine_threads(cfg, device)
    if engine is not None:
        return (
            f"rollout.staleness=1: of {cores} cores the trainer computes on {cores - engine} and "
            f"vLLM on {engine}, at the same time ({THREADS} sets both)"
        )
    each = os.environ.get(THREADS, "1")
    wanted = 2 * local_ranks() * (int(each) if each.isdigit() else 1)
    if wanted <= cores:
        return None
    return (
        f"rollout.staleness=1: trainer and vLLM compute at the same time with {wanted} threads on "
        f"{cores} core(s) ({THREADS}={each}), which may be slower than rollout.staleness=0"
    )

"""Process groups of a run (`ranks`) and models sharded over its ranks (`fsdp`)."""

from oprd.distributed.ranks import (
    from_rank_0,
    gather,
    init,
    joined,
    max_over_ranks,
    rank,
    run_main,
    seed_everything,
    shutdown,
    sum_gradients,
    sum_over_ranks,
    sum_tensor,
    wait_for_all,
    world_size,
)

__all__ = [
    "from_rank_0",
    "gather",
    "init",
    "joined",
    "max_over_ranks",
    "rank",
    "run_main",
    "seed_everything",
    "shutdown",
    "sum_gradients",
    "sum_over_ranks",
    "sum_tensor",
    "wait_for_all",
    "world_size",
]

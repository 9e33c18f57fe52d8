"""What ranks do together."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from oprd.distributed import sum_gradients


def on_rank(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    everywhere, on_one, nowhere, frozen = (torch.nn.Parameter(torch.zeros(2)) for _ in range(4))
    frozen.requires_grad_(False)
    everywhere.grad = torch.full((2,), 1.0 + rank)
    if rank == 1:  # an expert that this rank's tokens chose
        on_one.grad = torch.full((2,), 5.0)
    sum_gradients([on_one, everywhere, nowhere, frozen], torch.device("cpu"))
    results[rank] = [
        None if p.grad is None else p.grad.tolist() for p in (everywhere, on_one, nowhere)
    ]
    dist.destroy_process_group()


def test_a_gradient_on_one_rank_only_does_not_shift_the_others(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, (tmp_path / "meeting", results), nprocs=2)
        assert dict(results) == {r: [[3.0, 3.0], [5.0, 5.0], None] for r in (0, 1)}

"""Three steps of `attach` in a loop of one's own, on as many ranks as torchrun starts; for
`tests/oprd/distill/test_attach_in_trainers.py`.

    torchrun --nproc-per-node 2 -m tests.support.attach_on_ranks DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from oprd import attach
from tests.support.tiny import make_batch, make_model


def run(case: str) -> dict[str, torch.Tensor]:
    """Return the student's weights after three steps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    student, teacher = make_model("llama"), make_model("llama", seed=1)
    wrapped = student
    if case == "fsdp2":
        for layer in student.model.layers:
            fully_shard(layer)
        fully_shard(student)
        distiller = attach(student, teacher)
    elif case == "frozen":
        distiller = attach(student, teacher)
        distiller.freeze_unreached()
        wrapped = DistributedDataParallel(student)
    else:
        wrapped = DistributedDataParallel(student, find_unused_parameters=True)
        distiller = attach(wrapped, teacher, layers=[0])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for seed in range(3):
        ids, attention, response = make_batch(seed=seed)
        mine = slice(rank, None, ranks)
        optimizer.zero_grad()
        denominator = int(response.sum()) / ranks  # gradients are averaged over ranks
        batch = ids[mine], attention[mine], response[mine]
        model = wrapped if case == "frozen" else None
        distiller(*batch, denominator=denominator, model=model).loss.backward()
        optimizer.step()
    return get_model_state_dict(student, options=StateDictOptions(full_state_dict=True))


def main() -> None:
    dist.init_process_group("gloo")
    for case in ("unused", "frozen", "fsdp2"):
        weights = run(case)
        if dist.get_rank() == 0:
            torch.save(weights, Path(sys.argv[1]) / f"{case}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

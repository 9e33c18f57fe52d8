"""FSDP2 on two ranks, for `benchmarks.architectures`: the loss and gradient norm of one process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from benchmarks.architecture_checks import assert_close, batch, trained
from benchmarks.small_models import DRAWS_EXPERTS, make
from oprd import attach
from oprd.config.fsdp import FsdpConfig
from oprd.config.objectives import DistillOptions
from oprd.distill.distiller import Distiller
from oprd.distributed.fsdp import clip_gradients, make_mesh, shard
from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder
from oprd.models.loading import switch_off_dropout, unwritten_model
from oprd.models.self_check import check_structure

RANKS = 2


def fsdp2(config: PretrainedConfig, rank: int, store: Path) -> None:
    """Run on one of `RANKS` processes, each of which has one of the batch's sequences.

    As in a run, rank 0 alone has weights at first, and the teacher is cut before it is sharded.

    Args:
        store: a file that does not exist yet, by which the processes find each other.

    Raises:
        ConfigError: if oprd refuses, and `check_structure` foresees it.
    """
    data = batch()
    one = attach(trained(config), make(config, seed=1), positions="all")
    wanted = one(data.input_ids, data.attention_mask, data.response_mask)
    wanted.loss.backward()
    norm = clip_gradients(one.student.root.parameters(), None)

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    device = torch.device("cpu")
    mesh = make_mesh(device, None)
    student, teacher = (
        make(config, seed) if rank == 0 else unwritten_model(config, torch.float32)
        for seed in (0, 1)
    )
    switch_off_dropout(student)
    blocks = range(find_decoder(student).num_layers)
    try:
        shard(student, find_decoder(student).layers, FsdpConfig(), mesh, device)
    except ConfigError as error:
        try:
            check_structure(config, blocks, "student", sharded=True)
        except ConfigError:
            raise error from None
        raise AssertionError(f"the dry run says yes, and sharding: {error}") from error
    check_structure(config, blocks, "student", sharded=True)
    distiller = Distiller(student, teacher, DistillOptions(positions="all"))
    root = distiller.teacher.root.requires_grad_(False)
    shard(root, find_decoder(root).layers, FsdpConfig(), mesh, device)
    distiller.check()
    student.train(config.model_type not in DRAWS_EXPERTS)
    ids, mask, response = (
        x[rank : rank + 1] for x in (data.input_ids, data.attention_mask, data.response_mask)
    )
    rows = response.flatten().nonzero()[:, 0]
    states = distiller.teacher_states(ids, mask, rows)
    total = float(data.response_mask.sum())
    loss = distiller.student_loss(ids, mask, rows, states, denominator=total).loss
    loss.backward()
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    assert_close("the loss", whole, wanted.loss, 1e-4)
    assert_close("the gradient norm", clip_gradients(student.parameters(), None), norm, 1e-3)
    dist.barrier()
    dist.destroy_process_group()

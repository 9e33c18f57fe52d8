"""Options for sharding models over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oprd.errors import Problems


@dataclass
class FsdpConfig:
    """FSDP2: sharding of parameters, gradients and optimizer states over ranks.

    Decoder layers are gathered one at a time.

    Attributes:
        mode: ``auto``: use FSDP2 if there is more than one rank. ``never``: every rank holds the
            whole models, and gradients are summed over ranks. ``always``: use FSDP2 with one rank
            too, for ``param_dtype`` or ``cpu_offload``.
        param_dtype: dtype in which layers are gathered and computed. The student's weights stay in
            ``student.dtype`` (float32 master weights). Null: the dtype of the weights.
        reduce_dtype: dtype in which gradients are summed over ranks.
        reshard_after_forward: free a layer's gathered weights between forward and backward. This
            saves memory and costs another gather.
        shard_size: number of ranks that share one copy of the models. If there are several copies
            (hybrid sharding, for example one on each node), their gradients are summed. Null: all
            ranks share one copy.
        cpu_offload: keep the student's shards, gradients and optimizer states in main memory.
        teacher: ``sharded``: like the student. ``offloaded``: sharded, with the shards in main
            memory. ``replicated``: every rank holds the whole teacher, and nothing is gathered.
    """

    mode: Literal["auto", "always", "never"] = "auto"
    param_dtype: Literal["bfloat16"] | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    shard_size: int | None = None
    cpu_offload: bool = False
    teacher: Literal["sharded", "offloaded", "replicated"] = "sharded"

    def active(self, ranks: int) -> bool:
        """Return whether models are sharded in a run with this number of ranks."""
        return self.mode == "always" or (self.mode == "auto" and ranks > 1)

    def check(
        self, problems: Problems, autocast: str | None, ranks: int, own_teacher: bool
    ) -> None:
        """Add a problem for every option that does not fit the run.

        Args:
            autocast: the run's ``autocast``.
            ranks: number of ranks of the run.
            own_teacher: whether there is a teacher that is not the student itself.
        """
        need = problems.need
        problems.need_at_least_one({"fsdp.shard_size": self.shard_size})
        on = self.active(ranks)
        wanted = {
            "param_dtype": self.param_dtype is not None,
            "shard_size": self.shard_size is not None,
            "cpu_offload": self.cpu_offload,
            "teacher=offloaded": self.teacher == "offloaded",
        }
        for name, given in wanted.items():
            need(
                on or not given,
                f"fsdp.{name} is asked for, but FSDP is off (fsdp.mode={self.mode}, {ranks} rank"
                f"{'s' * (ranks > 1)}): set fsdp.mode=always",
            )
        need(
            autocast is None or self.param_dtype is None,
            f"autocast={autocast} and fsdp.param_dtype={self.param_dtype} are two ways to mix "
            "precisions: choose one",
        )
        if self.shard_size is not None and self.shard_size >= 1:
            need(
                ranks % self.shard_size == 0,
                f"fsdp.shard_size={self.shard_size} does not divide the {ranks} ranks",
            )
        need(
            self.teacher == "sharded" or own_teacher,
            f"fsdp.teacher={self.teacher}, but the teacher is the student itself, which is sharded",
        )

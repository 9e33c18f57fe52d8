"""How a run is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oprd.errors import Problems


@dataclass
class FsdpConfig:
    """FSDP2: parameters, gradients and optimizer states in shards; a decoder layer is gathered at a
    time.

    Attributes:
        mode: ``auto``: if there is more than one rank. ``never``: every rank holds all of it, and
            gradients are added up. ``always``: with one rank too, for ``param_dtype`` or
            ``cpu_offload``.
        param_dtype: what layers compute in and are gathered in, while the student's own weights
            stay in ``student.dtype`` (float32 master weights); null: the same.
        reduce_dtype: what gradients are added up in over ranks.
        reshard_after_forward: free a layer's gathered weights between forward and backward: less
            memory for one more gather.
        shard_size: ranks that share one copy; the copies are kept alike (hybrid sharding, a copy a
            node, say); null: all ranks.
        cpu_offload: the student's shards, gradients and optimizer live in main memory.
        teacher: ``sharded``, as the student; ``offloaded``: its shards in main memory;
            ``replicated``: every rank holds all of it, and nothing is gathered.
    """

    mode: Literal["auto", "always", "never"] = "auto"
    param_dtype: Literal["bfloat16"] | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    shard_size: int | None = None
    cpu_offload: bool = False
    teacher: Literal["sharded", "offloaded", "replicated"] = "sharded"

    def active(self, ranks: int) -> bool:
        """Whether models are sharded when there are so many ranks."""
        return self.mode == "always" or (self.mode == "auto" and ranks > 1)

    def check(
        self, problems: Problems, autocast: str | None, ranks: int, own_teacher: bool
    ) -> None:
        """Note what these ranks can't do.

        Args:
            autocast: the run's.
            ranks: that it is started with.
            own_teacher: whether a teacher is a model of its own, not the student.
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

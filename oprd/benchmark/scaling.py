"""Prediction of a training step's seconds on other numbers of GPUs, from measured parts.

What a GPU computes is measured. What FSDP2 sends is counted from the models' shapes, and takes
what a ring over links of given rates takes. Both are put together block by block, as FSDP2
prefetches: while a block is computed, the next one's weights are gathered, and in backward the
gradients of the one before are scattered. The first gather and the last reduce-scatter are waited
for. Nothing here has run on the numbers of GPUs that it predicts.

Sizes are in bytes, times in seconds, rates in bytes a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["weak", "strong"]
"""``weak``: every GPU has the sequences that it had when measured. ``strong``: all GPUs together
have as many as then."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, arranged in a ring that enters each node once.

    Attributes:
        ranks: number of ranks.
        per_node: number of them in one node.
    """

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes that the ring goes through."""
        return math.ceil(self.ranks / self.per_node)


@dataclass(frozen=True)
class Machine:
    """What connects the ranks.

    Attributes:
        per_node: GPUs of a node.
        node_rate: rate between GPUs of a node, of one GPU in one direction.
        network_rate: rate between nodes, of one GPU in one direction. A ring over several nodes is
            as fast as the slower of the two: its GPUs in a node use their adapters side by side.
        efficiency: share of these rates that collectives reach.
        node_latency, network_latency: seconds of a step of the ring inside a node, between nodes.
        launch: seconds that a collective takes besides.
        overlaps: collectives run beside computation.
        cores: cores that the ranks share, one for each rank while there are enough; None: every
            rank has a device of its own.
    """

    per_node: int
    node_rate: float
    network_rate: float
    efficiency: float = 1.0
    node_latency: float = 0.0
    network_latency: float = 0.0
    launch: float = 0.0
    overlaps: bool = True
    cores: float | None = None

    def all_gather(self, size: float, group: Group) -> float:
        """Return the seconds until every rank has all ``size`` bytes, of which it had its shard."""
        if group.ranks == 1 or not size:
            return 0.0
        rate = self.node_rate
        if group.nodes > 1:
            rate = min(rate, group.per_node * self.network_rate)
        steps = (group.ranks - group.nodes) * self.node_latency
        steps += (group.nodes - 1) * self.network_latency
        share = (group.ranks - 1) / group.ranks
        return self.launch + steps + share * size / (rate * self.efficiency)

    def reduce_scatter(self, size: float, group: Group) -> float:
        """Return the seconds until every rank has its shard of the sum of ``size`` bytes."""
        return self.all_gather(size, group)  # the same ring, backwards

    def all_reduce(self, size: float, group: Group) -> float:
        """Return the seconds until every rank has the sum of ``size`` bytes."""
        return 2 * self.all_gather(size, group) - (self.launch if group.ranks > 1 and size else 0)

    def slowdown(self, ranks: int) -> float:
        """Return how many times longer a rank computes because the ranks share cores."""
        return 1.0 if self.cores is None else max(1.0, ranks / self.cores)


@dataclass(frozen=True)
class Traffic:
    """What one model's forward and backward pass sends, if it is sharded.

    Attributes:
        blocks: number of blocks, each of which is gathered alone.
        block: bytes of a gathered block.
        root: bytes of the gathered embeddings (and head).
        again: blocks are gathered a second time, in backward.
        block_gradients, root_gradients: bytes of gradients that are summed; 0: frozen.
        is_sharded: False: every rank has the whole model, and nothing is gathered. Gradients are
            summed after the backward pass, one tensor at a time.
    """

    blocks: int
    block: float = 0.0
    root: float = 0.0
    again: bool = True
    block_gradients: float = 0.0
    root_gradients: float = 0.0
    is_sharded: bool = True


TENSORS = 9
"""Weight tensors in a block: four projections of attention, three of the MLP, two norms."""


@dataclass(frozen=True)
class Ranks:
    """A number of ranks on a machine, and how they share models.

    Attributes:
        shard_size: number of ranks that share one copy of the models (`fsdp.shard_size`).
    """

    machine: Machine
    ranks: int
    shard_size: int

    @property
    def shard(self) -> Group:
        """The ranks that share one copy of the models."""
        return Group(self.shard_size, min(self.shard_size, self.machine.per_node))

    @property
    def replicas(self) -> Group:
        """The ranks that have the same shard of different copies."""
        per_node = max(1, self.machine.per_node // self.shard_size)
        return Group(self.ranks // self.shard_size, per_node)

    def forward(self, compute: float, t: Traffic) -> float:
        """Return the seconds of a forward pass whose computation takes ``compute``."""
        if not t.is_sharded:
            return compute
        gather = self.machine.all_gather(t.block, self.shard)
        root = self.machine.all_gather(t.root, self.shard)
        return root + self._blocks(compute, t.blocks, first=gather, beside=gather, last=0.0)

    def backward(self, compute: float, t: Traffic) -> float:
        """Return the seconds of a backward pass, gradients of the replicas' shards included."""
        if not t.is_sharded:
            return compute
        gather = self.machine.all_gather(t.block, self.shard) if t.again else 0.0
        scatter, root = (self._sum(size) for size in (t.block_gradients, t.root_gradients))
        beside = gather + scatter
        return self._blocks(compute, t.blocks, first=gather, beside=beside, last=scatter) + root

    def whole_gradients(self, t: Traffic) -> float:
        """Return the seconds of the sum of gradients of models that are not sharded."""
        size = t.blocks * t.block_gradients + t.root_gradients
        if t.is_sharded or self.ranks == 1 or not size:
            return 0.0
        group = Group(self.ranks, min(self.ranks, self.machine.per_node))
        latency = self.machine.all_reduce(1, group)
        return self.machine.all_reduce(size, group) + (t.blocks * TENSORS - 1) * latency

    def whole_model(self, t: Traffic) -> float:
        """Return the seconds until every rank has all weights, one block after another."""
        if not t.is_sharded:
            return 0.0
        blocks = t.blocks * self.machine.all_gather(t.block, self.shard)
        return blocks + self.machine.all_gather(t.root, self.shard)

    def _sum(self, size: float) -> float:
        scatter = self.machine.reduce_scatter(size, self.shard)
        return scatter + self.machine.all_reduce(size / self.shard_size, self.replicas)

    def _blocks(
        self, compute: float, blocks: int, *, first: float, beside: float, last: float
    ) -> float:
        """Return the seconds of blocks one after another.

        Args:
            first: seconds waited for before the first block is computed.
            beside: seconds of communication beside each block but the last, which needs no more.
            last: seconds waited for after the last block.
        """
        if not self.machine.overlaps:
            return compute + first + (blocks - 1) * beside + last
        one = compute / blocks
        return first + (blocks - 1) * max(one, beside) + one + last


@dataclass(frozen=True)
class Measured:
    """A step as it was measured, of one rank.

    Attributes:
        ranks: number of ranks that it was measured on.
        sequences: sequences of the step on all of them.
        tokens: sampled tokens of a sequence, the mean.
        micro_batches: micro-batches of a rank.
        teacher, update: seconds of the teacher's forward passes; of the student's forward and
            backward passes.
        optimizer, sync: seconds of the optimizer's step; of the transfer of weights to the engine;
            None: not measured.
        forward_share: share of the update's computation that is forward.
    """

    ranks: int
    sequences: int
    tokens: float
    micro_batches: int
    teacher: float
    update: float
    optimizer: float | None = None
    sync: float | None = None
    forward_share: float = 1 / 3


@dataclass(frozen=True)
class Throughput:
    """How fast an engine samples; inputs, not measured here.

    Attributes:
        gpu: tokens a second of one GPU with many sequences.
        sequence: tokens a second of one sequence alone, which no number of GPUs exceeds; None:
            not a limit.
    """

    gpu: float
    sequence: float | None = None


@dataclass(frozen=True)
class Model:
    """A run: what was measured, and what its models send.

    Attributes:
        shard_size: as in `fsdp.shard_size`; None: all ranks share one copy.
        samples_beside: an engine with GPUs of its own samples while the student is trained
            (`rollout.staleness`), and is waited for only if it takes longer.
    """

    measured: Measured
    student: Traffic
    teacher: Traffic
    shard_size: int | None = None
    samples_beside: bool = False

    def ranks(self, machine: Machine, ranks: int) -> Ranks:
        """Return how so many ranks share the models; fewer than ``shard_size`` share one copy."""
        return Ranks(machine, ranks, min(self.shard_size or ranks, ranks))


@dataclass(frozen=True)
class Predicted:
    """A step on ``ranks`` ranks.

    Attributes:
        sequences: sequences of the rank that has most.
        rollout, sync, optimizer: seconds that a step takes for them; None: not known.
        teacher, update: seconds of computation.
        waiting: seconds in which a rank waits for its links, in the teacher's and student's passes.
        tokens: sampled tokens of the step on all ranks.
    """

    ranks: int
    sequences: int
    rollout: float | None
    sync: float | None
    teacher: float
    update: float
    waiting: float
    optimizer: float | None
    tokens: float

    @property
    def step(self) -> float:
        """Seconds of the parts that are known."""
        known = (self.rollout, self.sync, self.optimizer)
        return self.teacher + self.update + self.waiting + sum(x for x in known if x is not None)

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens a second on all ranks."""
        return self.tokens / self.step


def predict(
    model: Model,
    machine: Machine,
    ranks: int,
    scaling: Scaling,
    throughput: Throughput | None = None,
) -> Predicted:
    """Predict a step.

    Computation grows with the sequences of the rank that has most: a rank can't have less than one.
    The optimizer works on a rank's shard.

    Args:
        throughput: None: the seconds of rollouts are not predicted.
    """
    m, at = model.measured, model.ranks(machine, ranks)
    each = math.ceil(m.sequences / m.ranks)
    total = m.sequences if scaling == "strong" else each * ranks
    most = math.ceil(total / ranks)
    micro_batches = max(1, math.ceil(m.micro_batches * most / each))
    teacher, update = computed(model, machine)
    more = most / each * machine.slowdown(ranks)
    teacher, update = teacher * more, update * more
    waiting = _teacher_pass(model, at, micro_batches)(teacher) - teacher
    waiting += _update_pass(model, at, micro_batches)(update) - update
    rollout = None
    if throughput is not None:
        rollout = most * m.tokens / throughput.gpu
        if throughput.sequence is not None:
            rollout = max(rollout, m.tokens / throughput.sequence)
    before = model.ranks(machine, m.ranks)
    sync = optimizer = None
    if m.sync is not None:
        own = max(0.0, m.sync - before.whole_model(model.student))
        sync = own + at.whole_model(model.student)
    if m.optimizer is not None:
        shards = 1.0 if not model.student.is_sharded else before.shard_size / at.shard_size
        slower = machine.slowdown(ranks) / machine.slowdown(m.ranks)
        optimizer = m.optimizer * shards * slower
    if rollout is not None and model.samples_beside:
        rollout = max(0.0, rollout - (teacher + update + waiting + (optimizer or 0.0)))
    tokens = total * m.tokens
    return Predicted(ranks, most, rollout, sync, teacher, update, waiting, optimizer, tokens)


def computed(model: Model, machine: Machine) -> tuple[float, float]:
    """Return the seconds of teacher and update, on a rank that waits for none.

    What was measured on several ranks contains their waiting, as the prediction does: returned is
    the computation for which the prediction is what was measured (0 if the traffic alone takes
    longer).
    """
    m = model.measured
    at, slower = model.ranks(machine, m.ranks), machine.slowdown(m.ranks)
    teacher = _solve(_teacher_pass(model, at, m.micro_batches), m.teacher)
    update = _solve(_update_pass(model, at, m.micro_batches), m.update)
    return teacher / slower, update / slower


def _teacher_pass(model: Model, at: Ranks, micro_batches: int) -> Callable[[float], float]:
    """Return the seconds of a step's teacher passes as a function of their computation."""
    return lambda compute: micro_batches * at.forward(compute / micro_batches, model.teacher)


def _update_pass(model: Model, at: Ranks, micro_batches: int) -> Callable[[float], float]:
    """Return the seconds of a step's forward and backward passes, and the sum of gradients."""
    share = model.measured.forward_share

    def seconds(compute: float) -> float:
        one = compute / micro_batches
        forward = at.forward(share * one, model.student)
        backward = at.backward((1 - share) * one, model.student)
        return micro_batches * (forward + backward) + at.whole_gradients(model.student)

    return seconds


def _solve(seconds: Callable[[float], float], measured: float) -> float:
    """Return the computation that takes ``measured`` seconds, by bisection."""
    low, high = 0.0, measured
    if seconds(high) <= measured:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= measured else (low, middle)
    return low

"""Configuration of ``oprd-scaling``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oprd.benchmark.scaling import Machine, Throughput
from oprd.errors import Problems


@dataclass
class LinkConfig:
    """What connects the GPUs. The defaults are what is stated for nodes of eight H100 or H200.

    Attributes:
        gpus_per_node: number of GPUs in a node.
        node_gbs: rate between GPUs of a node, GB/s of one GPU in one direction.
        network_gbs: rate between nodes, GB/s of one GPU in one direction.
        efficiency: share of both rates that collectives reach.
        node_latency_us: microseconds of a step of a ring inside a node.
        network_latency_us: microseconds of a step of a ring between nodes.
        launch_us: microseconds that a collective takes besides.
    """

    gpus_per_node: int = 8
    node_gbs: float = 450.0
    network_gbs: float = 50.0
    efficiency: float = 0.8
    node_latency_us: float = 3.4
    network_latency_us: float = 14.0
    launch_us: float = 8.4

    def machine(self) -> Machine:
        """Return the machine that these links make."""
        return Machine(
            per_node=self.gpus_per_node,
            node_rate=self.node_gbs * 1e9,
            network_rate=self.network_gbs * 1e9,
            efficiency=self.efficiency,
            node_latency=self.node_latency_us * 1e-6,
            network_latency=self.network_latency_us * 1e-6,
            launch=self.launch_us * 1e-6,
        )


NCCL = "NCCL's own model of a ring (Simple), src/graph/tuning.cc"
SOURCES = {
    "gpus_per_node": "DGX H100, HGX H200",
    "node_gbs": "NVLink 4: NVIDIA states 900 GB/s in both directions",
    "network_gbs": "one 400 Gbit/s adapter a GPU, as in DGX H100",
    "efficiency": "an assumption; nccl-tests measures it",
    "node_latency_us": NCCL,
    "network_latency_us": NCCL,
    "launch_us": NCCL,
}
"""Where the defaults of `LinkConfig` come from."""


@dataclass
class ScalingConfig:
    """A prediction of a step's seconds on other numbers of GPUs.

    Attributes:
        measured: the directory of a run of ``oprd-train``, or the ``gains.json`` of ``oprd-gains``:
            what a GPU computes is read there.
        gpus: numbers of GPUs to predict for.
        objective: of ``gains.json``, the objective to read.
        gradient_checkpointing: of ``gains.json``, the mode to read.
        rollout_tokens_per_second: tokens a second that the engine samples on one GPU with many
            sequences, as you measured or were told; null: rollouts are left out.
        sequence_tokens_per_second: tokens a second of one sequence alone, below which no number of
            GPUs brings a rollout; null: not a limit.
        links: what connects the GPUs.
        output_dir: directory for ``scaling.json`` and the pictures; null: nothing is written.
    """

    measured: str = ""
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64, 512])
    objective: str = "oprd"
    gradient_checkpointing: Literal["on", "off"] = "on"
    rollout_tokens_per_second: float | None = None
    sequence_tokens_per_second: float | None = None
    links: LinkConfig = field(default_factory=LinkConfig)
    output_dir: str | None = None

    @property
    def throughput(self) -> Throughput | None:
        """The engine's throughput; None if it was not given."""
        if self.rollout_tokens_per_second is None:
            return None
        return Throughput(self.rollout_tokens_per_second, self.sequence_tokens_per_second)

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: listing everything that is wrong.
        """
        problems = Problems()
        need = problems.need
        need(
            bool(self.measured),
            "measured is not given: name the directory of a run (oprd-train), or the gains.json "
            "of oprd-gains",
        )
        need(bool(self.gpus), "gpus is empty: give numbers of GPUs, as in '[1,8,64,512]'")
        problems.need_at_least_one({f"gpus ({n})": n for n in self.gpus})
        need(
            self.sequence_tokens_per_second is None or self.rollout_tokens_per_second is not None,
            "sequence_tokens_per_second is given without rollout_tokens_per_second: give both, or "
            "leave it out",
        )
        rates = {
            "rollout_tokens_per_second": self.rollout_tokens_per_second,
            "sequence_tokens_per_second": self.sequence_tokens_per_second,
        }
        for name, value in rates.items():
            need(value is None or value > 0, f"{name} must be above 0, got {value}")
        links = vars(self.links)
        for name in ("gpus_per_node", "node_gbs", "network_gbs", "efficiency"):
            need(links[name] > 0, f"links.{name} must be above 0, got {links[name]}")
        need(
            self.links.efficiency <= 1,
            f"links.efficiency is a share, at most 1, got {self.links.efficiency}",
        )
        for name in ("node_latency_us", "network_latency_us", "launch_us"):
            need(links[name] >= 0, f"links.{name} must not be below 0, got {links[name]}")
        problems.refuse()

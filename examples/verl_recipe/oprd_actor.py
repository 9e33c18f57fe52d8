"""verl's FSDP2 actor, whose update gets the representation loss.

verl imports this file in its workers: `oprd_trainer.yaml` names `OPRDActorConfig` as the class of
``actor_rollout_ref.actor``. verl itself is not changed: its `EngineRegistry` takes engines of other
backends, and `OPRDActorConfig` names ours, which is verl's own with another step for a micro-batch.
"""
# ruff: noqa: E402

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import oprd
from oprd.errors import ConfigError, Problems

VERL = "0.9.1"


def check_verl() -> None:
    """Check that verl is the version whose internals this file was written for.

    Raises:
        ImportError: if it is not.
    """
    try:
        found = version("verl")
    except PackageNotFoundError as error:
        raise ImportError(f"verl is not installed: pip install verl=={VERL}") from error
    if found != VERL:
        raise ImportError(
            f"oprd_actor.py overrides parts of verl {VERL}'s FSDPEngineWithLMHead, and verl "
            f"{found} is installed: pip install verl=={VERL}, or compare _build_model_optimizer, "
            "forward_backward_batch and forward_step of the two versions and change VERL"
        )


check_verl()  # before the imports, which would fail with other errors

import torch
import torch.distributed as dist
from rep_step import RepStep, distiller_inputs, written_tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel, AutoTokenizer
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.config import FSDPActorConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from oprd.models.compatibility import check_vocabularies
from oprd.models.decoder import find_decoder

BACKEND = "oprd_fsdp2"


@dataclass
class OPRDOptions:
    """Options under ``actor_rollout_ref.actor.oprd``.

    Attributes:
        teacher: directory or name of the teacher, which reads the student's token ids.
        rep_weight: weight of the representation loss.
        policy_weight: weight of verl's own loss. 0: it is not computed, nor the LM head.
        distill: options of `oprd.attach`.
    """

    teacher: str | None = None
    rep_weight: float = 1.0
    policy_weight: float = 0.0
    distill: dict[str, Any] = field(default_factory=dict)


@dataclass
class OPRDActorConfig(FSDPActorConfig):
    """verl's FSDP actor configuration, with OPRD's options.

    Raises:
        ConfigError: if the options do not fit together.
    """

    oprd: OPRDOptions = field(default_factory=OPRDOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems, o = Problems(), self.oprd
        problems.need(
            bool(o.teacher), "actor.oprd.teacher is not set: give the teacher's directory or name"
        )
        problems.need(
            self.strategy == "fsdp2",
            f"actor.strategy must be fsdp2, got {self.strategy!r}: the taps need the modules of "
            "the student as they are",
        )
        problems.need(
            self.fsdp_config.ulysses_sequence_parallel_size == 1,
            "actor.ulysses_sequence_parallel_size must be 1: a rank would see a part of the "
            "sequences only",
        )
        if not o.policy_weight:
            for name, unset in {
                "use_kl_loss": False,
                "entropy_coeff": 0,
                "calculate_entropy": False,
                "calculate_sum_pi_squared": False,
                "use_fused_kernels": False,
            }.items():
                found = getattr(self, name)
                problems.need(
                    found == unset,
                    f"actor.{name}={found} needs the LM head, which actor.oprd.policy_weight=0 "
                    f"leaves out: set actor.{name}={unset} or a policy_weight",
                )
        problems.refuse()
        # The engine's `strategy`, by which workers find it, is a frozen field.
        object.__setattr__(self.engine, "strategy", BACKEND)
        object.__setattr__(self.engine, "oprd", self.oprd)


@EngineRegistry.register(model_type="language_model", backend=BACKEND, device=["cuda", "cpu"])
class OPRDEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 engine with a frozen teacher, sharded over the same ranks.

    An update runs teacher and student on each micro-batch of rollouts. Forward passes without an
    update (log-probs) are verl's own.
    """

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        self.oprd: OPRDOptions = engine_config.oprd
        object.__setattr__(engine_config, "strategy", "fsdp2")  # verl's own code asks for it
        # The tapped states, and the logits' stand-in, are views that nothing writes to.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        super().__init__(model_config, engine_config, *args, **kwargs)

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        teacher = self._load_teacher()
        with self._autocast():
            distiller = oprd.attach(self.module, teacher, **self.oprd.distill)
        group = self.get_data_parallel_group()
        self.rep = RepStep(
            distiller, self.get_data_parallel_size(), lambda x: dist.all_reduce(x, group=group)
        )

    def _load_teacher(self) -> nn.Module:
        path, trust = self.oprd.teacher, self.model_config.trust_remote_code
        student = self.model_config.tokenizer
        if student is not None:
            theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
            check_vocabularies(student, theirs, config)
        teacher = AutoModel.from_pretrained(
            path,
            dtype=self._autocast_dtype,
            attn_implementation=self.model_config.hf_config._attn_implementation,
            trust_remote_code=trust,
        ).requires_grad_(False)
        for layer in find_decoder(teacher).layers:
            fully_shard(layer, mesh=self.device_mesh)
        return fully_shard(teacher, mesh=self.device_mesh, reshard_after_forward=True)

    def _autocast(self) -> AbstractContextManager:
        """The context in which verl runs the student."""
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(get_device_name(), self._autocast_dtype)

    def to(
        self, device: Any, model: bool = True, optimizer: bool = True, grad: bool = True
    ) -> None:
        """Move the teacher with the student's parameters, which verl may offload."""
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if model:
            self.rep.distiller.teacher.root.to(device)

    def forward_backward_batch(
        self, data: Any, loss_function: Any, forward_only: bool = False
    ) -> Any:
        """Count the states that are compared in a mini-batch, on all ranks."""
        if not forward_only:
            images = extract_multi_modal_inputs(data.get("multi_modal_inputs", []))
            if images or data["position_ids"].dim() == 3:
                raise ConfigError(
                    "prompts with images, or a model with positions in space (M-RoPE): oprd "
                    "compares states of texts only"
                )
            parts = written_tokens(data), data["position_ids"].values()
            self.rep.begin(*(part.to(get_device_id()) for part in parts))
        return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """Compute the weighted sum of both losses for a micro-batch."""
        if forward_only:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        model_inputs, _ = self.prepare_model_inputs(micro_batch)
        inputs = distiller_inputs(model_inputs, written_tokens(micro_batch))
        if self.oprd.policy_weight:
            with self.rep.beside(inputs) as session:  # inside, verl runs the student as always
                policy_loss, output = super().forward_step(micro_batch, loss_function, False)
            out = session.output()
            loss = self.oprd.policy_weight * policy_loss + self.oprd.rep_weight * out.loss
        else:
            output = {"model_output": {}, "metrics": {}}
            with self._root_gathered(), self._autocast():
                out = self.rep.alone(inputs)
            loss = self.oprd.rep_weight * out.loss
        output["loss"] = loss.detach().item()
        for name, value in self.rep.summary(out).items():
            output["metrics"][name] = Metric(AggregationType.SUM, value)
        return loss, output

    @contextmanager
    def _root_gathered(self) -> Iterator[None]:
        """Keep the weights of the student's root gathered after a forward pass, until backward.

        FSDP2 gathers them for backward if a gradient reaches the root's output. The representation
        loss's does not, but the final norm's backward needs them.
        """
        self.module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            again = self.engine_config.reshard_after_forward
            self.module.set_reshard_after_forward(again, recurse=False)

"""Builds the models of a run: loading, taps, sharding and the precision they run in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from oprd import distributed
from oprd.bridge import load_bridge
from oprd.config import StudentConfig, TeacherConfig, TrainConfig
from oprd.distill.distiller import Distiller
from oprd.distill.objectives import REP, Objectives
from oprd.distributed.fsdp import is_sharded, make_mesh, shard
from oprd.models.compile import compile_layers
from oprd.models.decoder import find_decoder
from oprd.models.float8 import to_float8
from oprd.models.lm_head import LMHead, copy_lm_head
from oprd.models.loading import empty_model, load_model, switch_off_dropout, teacher_path
from oprd.models.lora import add_adapter
from oprd.models.recompute import recompute_blocks
from oprd.models.without_adapter import WithoutAdapter
from oprd.training.float8_error import measured_float8
from oprd.training.inputs import RunInputs

logger = logging.getLogger(__name__)


def autocast(dtype: str | None, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context that ``cfg.autocast`` asks for; None: one that does nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


class Builder:
    """Loads the models of a run onto this rank's device.

    Under FSDP2 only rank 0 reads weights; it sends the other ranks their shards.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        device: torch.device,
        recomputed: bool | int = False,
        inputs: RunInputs | None = None,
    ) -> None:
        """Load the student and its teachers.

        Args:
            inputs: prompts and layer pairs, on which the error of teachers in float8 is measured;
                None: it is not.
            recomputed: the number of the student's blocks whose activations are recomputed, see
                `oprd.models.recompute.recompute_blocks`.

        Raises:
            ConfigError: if a model can't be loaded, see `oprd.models.loading.load_model`.
        """
        self.cfg, self.device, self.fsdp = cfg, device, cfg.fsdp
        self.mesh = None
        if self.fsdp.active(distributed.world_size()):
            self.mesh = make_mesh(device, self.fsdp.shard_size)
        self.shards_teacher = self.mesh is not None and self.fsdp.teacher != "replicated"
        self.student = self._load(cfg.student, sharded=self.mesh is not None)
        self.teachers = self._load_teachers()
        self._to_float8(inputs)
        if cfg.distill.init_head_from_teacher:
            copy_lm_head(next(iter(self.teachers.values())), self.student)
        self.recomputed = recompute_blocks(self.student, recomputed)
        if cfg.student.compile:
            compile_layers(self.student)
        for name, teacher in cfg.all_teachers.items():
            if teacher.compile:
                compile_layers(self.teachers[name])
        if self.mesh is not None:
            offload = self.fsdp.cpu_offload
            shard(
                self.student,
                find_decoder(self.student).layers,
                self.fsdp,
                self.mesh,
                device,
                cpu_offload=offload,
            )
        if any(name != REP for name in cfg.objectives):  # these need a whole teacher
            for model in self.teachers.values():
                self._shard_teacher(model)

    def whole_teacher(self, name: str) -> PreTrainedModel:
        """Return a teacher with all its layers, sharded if FSDP2 shards teachers.

        A teacher that is sharded later, after its unneeded layers are dropped, is loaded a second
        time here: FSDP2 can't drop layers of a sharded model.
        """
        model = self.teachers[name]
        if not self._needs_sharding(model):
            return model
        whole = self._load(self._teacher(name), sharded=True)
        self._shard_teacher(whole)
        return whole

    def objectives(self, shared_ids: Mapping[str, int | None] = MappingProxyType({})) -> Objectives:
        """Attach the teachers and return the objectives.

        The parts of the teachers that no objective needs are freed with this `Builder`.

        Args:
            shared_ids: see `oprd.training.inputs.RunInputs`.

        Raises:
            ValueError: if models do not fit together, see `oprd.distill.distiller.attach`.
        """
        distillers: dict[str, Distiller] = {}
        heads = {}
        if self.cfg.logging.teacher_head and not self.shards_teacher:
            heads = {n: LMHead.of(m) for n, m in self.teachers.items() if n in shared_ids}
        for name, model in self.teachers.items() if REP in self.cfg.objectives else ():
            distillers[name] = self._attach(name, model, distillers)
            self._shard_teacher(distillers[name].teacher.root)
        cfg = self.cfg
        return Objectives(
            cfg.objectives,
            self.student,
            self.teachers,
            distillers,
            cfg.distill,
            cfg.opd,
            cfg.rollout.temperature,
            shared_ids,
            heads,
        )

    def _load(self, cfg: StudentConfig | TeacherConfig, *, sharded: bool) -> PreTrainedModel:
        """Load a model. If ``sharded``, load it on the CPU, and only rank 0 reads the weights."""
        if not sharded:
            model = load_model(cfg, self.device)
        else:
            model = load_model(cfg) if distributed.rank() == 0 else empty_model(cfg)
        if isinstance(cfg, StudentConfig) and not cfg.dropout:
            switch_off_dropout(model)
        if isinstance(cfg, StudentConfig) and cfg.lora.rank is not None:
            add_adapter(model, cfg.lora, self.cfg.seed)
        return model

    def _load_teachers(self) -> dict[str, Any]:
        """Load the teachers by name. Teachers with the same configuration share one model."""
        loaded: list[tuple[TeacherConfig, Any]] = []
        models = {}
        for name, cfg in self.cfg.all_teachers.items():
            model = next((m for other, m in loaded if other == cfg), None)
            if model is None and cfg.path == "self:current":
                model = self.student
            elif model is None and cfg.path == "self:base":
                model = WithoutAdapter(self.student)
            elif model is None:
                model = self._load(self._teacher(name), sharded=self.shards_teacher)
            loaded.append((cfg, model))
            models[name] = model
        return models

    def _to_float8(self, inputs: RunInputs | None) -> None:
        """Round the teachers that are to compute in float8; log the error that this makes."""
        rounded: list[Any] = []
        for name, teacher in self.cfg.all_teachers.items():
            model = self.teachers[name]
            if not teacher.fp8 or any(model is other for other in rounded):
                continue
            rounded.append(model)
            if inputs is None or inputs.train is None:
                to_float8(model)
                continue
            ours, theirs = (find_decoder(m).num_layers - 1 for m in (self.student, model))
            pairs = inputs.layer_pairs.get(name) or [(ours, theirs)]
            with autocast(self.cfg.autocast, self.device):
                lines = measured_float8(
                    # Of a sharded student most ranks have no weights yet; projected states of two
                    # widths can't be compared so.
                    None if self.mesh or self.cfg.all_bridges[name].path else self.student,
                    model,
                    inputs.train.prompts,
                    pairs,
                    name,
                )
            for line in lines:
                logger.info(line)

    def _teacher(self, name: str) -> TeacherConfig:
        teacher = self.cfg.all_teachers[name]
        return replace(teacher, path=teacher_path(teacher, self.cfg.student))

    def _shard_teacher(self, model: Any) -> None:
        if not self._needs_sharding(model):
            return
        assert self.mesh is not None
        model.requires_grad_(False)
        offload = self.fsdp.teacher == "offloaded"
        shard(
            model,
            find_decoder(model).layers,
            self.fsdp,
            self.mesh,
            self.device,
            cpu_offload=offload,
        )

    def _needs_sharding(self, model: Any) -> bool:
        root = model.adapted if isinstance(model, WithoutAdapter) else model
        return self.shards_teacher and not is_sharded(root)

    def _attach(
        self, name: str, teacher: PreTrainedModel, distillers: dict[str, Distiller]
    ) -> Distiller:
        for other, distiller in distillers.items():
            if self.teachers[other] is teacher:
                return distiller
        b = self.cfg.all_bridges[name]
        bridge = None if b.path is None else load_bridge(b.path, b.rank)
        if distillers:
            return next(iter(distillers.values())).with_teacher(teacher, bridge)
        return Distiller(self.student, teacher, self.cfg.distill, bridge)

"""Prediction of the memory that a training run needs on each GPU, from shapes alone.

    oprd-train --config recipes/x.yaml --dry_run --plan.gpus 8 --plan.memory_gib 80

`oprd.memory_plan.update` predicts one student update. This module adds the resident weights,
gradients and AdamW states, according to their sharding, and the other phases of a step. It does not
count the CUDA context and NCCL's buffers (1 to 2 GiB), nor fragmentation of the allocator.

Sizes are in bytes. A micro-batch has N tokens, M of them supervised rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from oprd.config import TeacherConfig, TrainConfig
from oprd.config.optim import UPDATED_AT_ONCE
from oprd.config.types import Checkpointing
from oprd.distill.chunked import chunk_rows
from oprd.distill.objectives import REP
from oprd.memory_plan.shapes import DTYPE_BYTES, FLOAT32, Shape, Update, adapter_parameters
from oprd.memory_plan.update import Moment, moments
from oprd.models.layer_pairs import pair_layers
from oprd.observability.memory import GIB

UPDATE, TEACHER, ROLLOUT, EVALUATION, STEP = (
    "student update",
    "teacher",
    "rollout",
    "evaluation",
    "optimizer step",
)
ENGINE = "vLLM"
WEIGHT_GRADIENTS = (
    "head's weight gradient",
    "head's weight gradient, float32",
    "embedding's weight gradient",
    "sum of both weight gradients",
    "block's gradients in reduce-scatter",
    "down projection's weight gradient",
    "embedding's and head's gradients in reduce-scatter",
)
"""Terms of an update that don't occur if the weights are frozen."""
FORWARD = 3
"""Blocks' worth of gathered weights that FSDP holds in a forward pass: the current block twice (as
gathered, and split into its weights) and the prefetched next block."""


@dataclass(frozen=True)
class TrainingPlan:
    """The memory that a run needs on each GPU.

    Attributes:
        resident: bytes that are held all the time, by name.
        moments: for each phase, the moment at which it holds most beyond ``resident``.
        tokens: the largest N; a response longer than ``micro_batch_tokens`` is a batch of its own.
        sequences: number of sequences generated at once, by phase.
    """

    resident: dict[str, int]
    moments: dict[str, Moment]
    tokens: int
    sequences: dict[str, int]

    @property
    def worst(self) -> str:
        """The phase that needs most memory."""
        return max(self.moments, key=lambda phase: self.moments[phase].total)

    @property
    def total(self) -> int:
        """Bytes needed at the worst moment."""
        return sum(self.resident.values()) + self.moments[self.worst].total


def make_training_plan(
    cfg: TrainConfig,
    student: Shape,
    teachers: dict[str, Shape],
    gpus: int,
    memory: int | None = None,
    on_gpu: bool = True,
    ranks: Mapping[str, int] | None = None,
) -> TrainingPlan:
    """Predict the memory that a run needs on each of ``gpus``.

    Args:
        teachers: shape of every teacher, by name; the student's shape for self-distillation.
        memory: bytes of a GPU; a vLLM engine takes a share of it.
        on_gpu: False for a CPU, whose AdamW and chunked losses need other temporaries.
        ranks: ranks of the bridges in their files, by teacher.
    """
    return _Planner(cfg, student, teachers, gpus, memory, on_gpu, ranks or {}).plan()


@dataclass(frozen=True)
class _Sampled:
    """A model that `generate` samples from.

    Attributes:
        computed: bytes per number in matrix products.
        stream: bytes per number in the residual stream.
        gathered: bytes per weight that FSDP has gathered; 0 if the model is not sharded.
    """

    name: str
    shape: Shape
    computed: int
    stream: int
    gathered: int


class _Planner:
    """The computation of a `TrainingPlan`."""

    def __init__(
        self,
        cfg: TrainConfig,
        student: Shape,
        teachers: dict[str, Shape],
        gpus: int,
        memory: int | None,
        on_gpu: bool,
        ranks: Mapping[str, int],
    ) -> None:
        self.cfg, self.student, self.teachers, self.gpus = cfg, student, teachers, gpus
        self.memory, self.on_gpu, self.ranks = memory, on_gpu, ranks
        fsdp = cfg.fsdp
        self.shards = (fsdp.shard_size or gpus) if fsdp.active(gpus) else 1
        self.stored = DTYPE_BYTES[cfg.student.dtype]
        self.gathered = DTYPE_BYTES[fsdp.param_dtype] if fsdp.param_dtype else self.stored
        self.computed = DTYPE_BYTES[cfg.autocast] if cfg.autocast else self.gathered
        self.stream = self.stored if cfg.autocast else self.computed
        self.teacher_sharded = self.shards > 1 and fsdp.teacher != "replicated"
        lora = cfg.student.lora
        self.adapter = 0 if lora.rank is None else adapter_parameters(student, lora)
        self.sequences = max(
            1, cfg.rollout.prompts_per_step * cfg.rollout.responses_per_prompt // gpus
        )
        self.longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
        self.tokens = max(self.longest, min(cfg.micro_batch_tokens, self.sequences * self.longest))
        d = cfg.distill
        kept = {"all": cfg.rollout.max_new_tokens, "last": 1}.get(d.positions, d.k)
        self.rows = min(self.tokens, self.sequences * min(kept, cfg.rollout.max_new_tokens))
        self.needs_logits = any(name != REP for name in cfg.objectives)
        self.depth = student.layers  # blocks that the backward pass goes through
        if not self.needs_logits:
            self.depth = 1 + max(
                block for shape in teachers.values() for block, _ in self._pairs(shape)
            )
        else:  # output-space losses take every token
            self.rows = min(self.tokens, self.sequences * cfg.rollout.max_new_tokens)

    def plan(self) -> TrainingPlan:
        """Compute the plan."""
        at_once = self.cfg.rollout.batch_size or self.sequences
        sequences = {ROLLOUT: min(self.sequences, at_once)}
        moments = {
            UPDATE: self._update(),
            TEACHER: self._teacher_forward(),
            ROLLOUT: self._rollouts(sequences[ROLLOUT]),
        }
        if self.cfg.eval.sets:
            sequences[EVALUATION] = self.cfg.eval.batch_size
            moments[EVALUATION] = self._evaluation()
        trained = self._trained_bytes() if self.on_gpu and not self.cfg.fsdp.cpu_offload else 0
        if self._widened() > 1:  # updated in pieces: weight, gradient, noise and square root
            trained = min(trained // self.stored, UPDATED_AT_ONCE) * 4 * FLOAT32
        elif self.cfg.optim.fused:
            trained = 0
        moments[STEP] = Moment("square roots of AdamW's second moments", {"temporaries": trained})
        return TrainingPlan(self._resident(), moments, self.tokens, sequences)

    # Resident memory -------------------------------------------------------------------

    def _resident(self) -> dict[str, int]:
        weights = self.student.parameters * self.stored // self.shards
        trained = self._trained_bytes()
        terms = {
            "student's weights": weights + (trained if self.adapter else 0),
            "gradients": trained,
            "AdamW's moments": 2 * trained * self._widened(),
        }
        if self.cfg.fsdp.cpu_offload:
            terms = dict.fromkeys(terms, 0)
        seen: list[TeacherConfig] = []
        for name, teacher in self.cfg.all_teachers.items():
            if teacher.shares_student or teacher in seen:
                continue
            seen.append(teacher)
            named = f"teacher's weights {name}".strip()
            terms[named] = self._teacher_bytes(name, teacher)
        if self._engine_share() and not self._engine_sleeps():
            terms["vLLM engine"] = self._engine_bytes()
        return terms

    def _widened(self) -> int:
        """Return how much wider the moments are than the weights."""
        return FLOAT32 // self.stored if self.cfg.optim.rounding == "stochastic" else 1

    def _trained_bytes(self) -> int:
        """Return the bytes of the weights that get a gradient.

        Losses on hidden states give no gradient to an untied head, nor to blocks after the deepest
        one compared.
        """
        if self.adapter:
            return self.adapter * FLOAT32 // self.shards
        s = self.student
        reached = s.parameters
        if not self.needs_logits:
            reached = self.depth * s.block_parameters + s.vocab * s.d
        return reached * self.stored // self.shards

    def _teacher_bytes(self, name: str, teacher: TeacherConfig) -> int:
        size = self._teacher_parameters(name) * DTYPE_BYTES[teacher.dtype]
        if teacher.fp8:  # scales, one a row, are about a thousandth
            saved = DTYPE_BYTES[teacher.dtype] - DTYPE_BYTES["float8"]
            size -= self._teacher_blocks(name) * self.teachers[name].block_parameters * saved
        if not self.teacher_sharded:
            return size
        return 0 if self.cfg.fsdp.teacher == "offloaded" else size // self.shards

    def _teacher_parameters(self, name: str) -> int:
        """Return the number of parameters in the part of the teacher that is kept."""
        shape = self.teachers[name]
        if self.needs_logits:
            return shape.parameters
        blocks = self._teacher_blocks(name)
        keeps_head = self.cfg.logging.teacher_head and not (shape.tied or self.teacher_sharded)
        tables = 2 if keeps_head else 1
        return blocks * shape.block_parameters + tables * shape.vocab * shape.d

    def _teacher_blocks(self, name: str) -> int:
        """Return the number of the teacher's blocks that are kept."""
        shape = self.teachers[name]
        if self.needs_logits:
            return shape.layers
        return max(block for _, block in self._pairs(shape)) + 1

    def _pairs(self, teacher: Shape) -> list[tuple[int, int]]:
        return pair_layers(self.cfg.distill.layers, self.student.layers, teacher.layers)

    # The phases -----------------------------------------------------------------------------------

    def _update(self) -> Moment:
        update = Update(
            batch=1,
            tokens=self.tokens,
            rows=self.rows,
            dtype_bytes=self.computed,
            checkpointing=recomputed_blocks(self.cfg.student.gradient_checkpointing),
            chunk=self.cfg.opd.chunk_tokens or chunk_rows(self.student.vocab, self.on_gpu),
            k=self.cfg.opd.k,
            widen_head=not self.on_gpu,
            shards=self.shards,
            gathered_bytes=self.gathered,
            reduced_bytes=DTYPE_BYTES[self.cfg.fsdp.reduce_dtype],
            stream_bytes=self.stream,
            span=self._span(self.cfg.student.attn_implementation),
            eager=self.cfg.student.attn_implementation == "eager",
        )
        reached = replace(self.student, layers=self.depth)
        peaks = [m for o in self._objectives() for m in moments(o, reached, update)]
        if self.adapter:
            peaks = [
                Moment(m.name, {n: x for n, x in m.terms.items() if n not in WEIGHT_GRADIENTS})
                for m in peaks
            ]
        worst = max(peaks, key=lambda m: m.total)
        extra = self._teacher_outputs() | self._teacher_root() | self._teacher_ahead()
        if self.computed < self.gathered:
            blocks = max(1, self.student.layers - update.recomputed(self.student.layers))
            extra["autocast's copies of weights"] = (
                blocks * self.student.block_parameters * self.computed
            )
        return Moment(worst.name, worst.terms | extra)

    def _span(self, attention: str | None) -> int:
        """Return the row length of the attention mask; 0 for flash and flex attention."""
        if attention not in (None, "sdpa", "eager"):
            return 0
        return self.tokens if self.cfg.packing else self.longest

    def _objectives(self) -> list[str]:
        """Return the objectives under the planner's names."""
        names = []
        for name in self.cfg.objectives:
            if name == REP:
                bridged = any(b.path for b in self.cfg.all_bridges.values())
                names.append("bridge" if bridged else "oprd")
                continue
            form = self.cfg.opd.form(name)
            of, *_ = form.split("_")  # other variants of a form need the same
            if self.cfg.opd.implementation == "materialised":
                names.append(f"opd_{of}")
            else:
                names.append("opd_topk_set_chunked" if form == "topk" else f"opd_{of}_chunked")
        return names

    def _teacher_outputs(self) -> dict[str, int]:
        """Return the largest teacher's outputs, which are held during the student's update."""
        sizes = [0]
        for name, shape in self.teachers.items():
            size = 0
            if REP in self.cfg.objectives:
                rank = self._rank(name)
                width = self._teacher_stream(name) * shape.d if rank is None else FLOAT32 * rank
                size += len(self._pairs(shape)) * self.rows * width
            if self.needs_logits:
                chunked = self.cfg.opd.implementation == "chunked"
                e = self._teacher_computes(name)
                size += self.rows * shape.d * e if chunked else self.tokens * shape.vocab * e
            sizes.append(size)
        return {"teacher's outputs": max(sizes)}

    def _teacher_ahead(self) -> dict[str, int]:
        """Return what the next micro-batch's teacher pass holds beside the student's update."""
        if not self.cfg.overlap:
            return {}
        terms = {"next teacher's outputs": self._teacher_outputs()["teacher's outputs"]}
        if self.on_gpu:  # on a CPU the pass is over before the update begins
            names = ("one block's MLP", "states", "attention mask", "attention")
            forward = self._teacher_forward().terms
            terms["next teacher's forward"] = sum(forward.get(name, 0) for name in names)
        return terms

    def _rank(self, name: str) -> int | None:
        """Return the rank of a teacher's bridge, or None without a bridge.

        The rank is the student's width if neither the configuration nor the file gives it.
        """
        bridge = self.cfg.all_bridges[name]
        if not bridge.path:
            return None
        return bridge.rank or self.ranks.get(name) or self.student.d

    def _teacher_computes(self, name: str) -> int:
        """Return the bytes per number in a teacher's matrix products."""
        teacher = self.cfg.all_teachers[name]
        if teacher.shares_student:
            return self.computed
        if self.cfg.autocast:
            return DTYPE_BYTES[self.cfg.autocast]
        return self._teacher_gathered(teacher)

    def _teacher_stream(self, name: str) -> int:
        """Return the bytes per number in a teacher's residual stream, which autocast keeps."""
        if not self.cfg.autocast:
            return self._teacher_computes(name)
        teacher = self.cfg.all_teachers[name]
        return self.stored if teacher.shares_student else DTYPE_BYTES[teacher.dtype]

    def _teacher_gathered(self, teacher: TeacherConfig) -> int:
        if self.teacher_sharded and self.cfg.fsdp.param_dtype:
            return DTYPE_BYTES[self.cfg.fsdp.param_dtype]
        return DTYPE_BYTES[teacher.dtype]

    def _teacher_root(self) -> dict[str, int]:
        """Return the embeddings (and head), which stay gathered until the losses are computed."""
        if not self.teacher_sharded:
            return {}
        sizes = [0]
        for name, shape in self.teachers.items():
            teacher = self.cfg.all_teachers[name]
            if not teacher.shares_student:
                tables = 2 if self.needs_logits and not shape.tied else 1
                sizes.append(tables * shape.vocab * shape.d * self._teacher_gathered(teacher))
        return {"teacher's gathered embedding and head": max(sizes)}

    def _teacher_forward(self) -> Moment:
        peaks = []
        for name, shape in self.teachers.items():
            e = self._teacher_computes(name)
            terms = {
                "one block's MLP": 3 * self.tokens * shape.intermediate * e,
                "states": 3 * self.tokens * shape.d * self._teacher_stream(name),
                **self._teacher_attention(name, shape),
            }
            if self.teacher_sharded:
                block = shape.block_parameters * self._teacher_gathered(self.cfg.all_teachers[name])
                terms["gathered weights, three blocks"] = FORWARD * block
            peaks.append(Moment("a block", terms))
        worst = max(peaks, key=lambda m: m.total)
        return Moment(worst.name, worst.terms | self._teacher_outputs() | self._teacher_root())

    def _teacher_attention(self, name: str, shape: Shape) -> dict[str, int]:
        """Return the terms that an attention mask adds to a teacher's forward pass."""
        e, teacher = self._teacher_computes(name), self.cfg.all_teachers[name]
        model = self.cfg.student if teacher.shares_student else teacher
        attention = model.attn_implementation
        span = self._span(attention)
        if not span:
            return {}
        weights = shape.heads * (FLOAT32 + e) if attention == "eager" else 0
        return {
            "attention mask": self.tokens * span * (e + 1),
            "attention": self.tokens * (span * weights + shape.repeated(e)),
        }

    def _rollouts(self, sequences: int) -> Moment:
        if self.cfg.rollout.engine != "vllm":
            return self._generation(self._student(), sequences, self.longest)
        return self._by_engine()

    def _evaluation(self) -> Moment:
        """Return the worst moment of an evaluation. Teachers always use `generate`."""
        e = self.cfg.eval
        tokens, peaks = self.cfg.data.max_prompt_tokens + e.max_new_tokens, []
        if self.cfg.rollout.engine == "vllm":
            peaks.append(self._by_engine())
        else:
            peaks.append(self._generation(self._student(), e.batch_size, tokens))
        if e.teacher:
            peaks += [
                self._generation(self._teacher(name), e.batch_size, tokens)
                for name in self.teachers
            ]
        return max(peaks, key=lambda m: m.total)

    def _student(self) -> _Sampled:
        gathered = self.gathered if self.shards > 1 else 0
        return _Sampled("student", self.student, self.computed, self.stream, gathered)

    def _teacher(self, name: str) -> _Sampled:
        teacher = self.cfg.all_teachers[name]
        gathered = self._teacher_gathered(teacher) if self.teacher_sharded else 0
        return _Sampled(
            f"teacher {name}".strip(),
            self.teachers[name],
            self._teacher_computes(name),
            self._teacher_stream(name),
            gathered,
        )

    def _generation(self, model: _Sampled, sequences: int, tokens: int) -> Moment:
        """Return the worst moment of Hugging Face's `generate`."""
        s, prompt = model.shape, self.cfg.data.max_prompt_tokens
        # Under autocast the rotary embedding returns keys in the dtype of the residual stream.
        layer = sequences * s.kv_heads * s.head_dim * (model.stream + model.computed)
        kept = {"logits, sorted": sequences * s.vocab * (4 * FLOAT32 + 8)}
        if model.gathered:
            root = (1 if s.tied else 2) * s.vocab * s.d
            kept["gathered weights"] = (root + FORWARD * s.block_parameters) * model.gathered
        mlp = 3 * sequences * prompt * s.intermediate * model.computed
        first = {"keys and values": prompt * s.layers * layer, "one block's MLP": mlp}
        last = {
            "keys and values": tokens * s.layers * layer,
            "a layer's keys, to be one longer": tokens * layer // 2,
        }
        peaks = [
            Moment(f"{model.name}, the prompts", first | kept),
            Moment(f"{model.name}, the last token", last | kept),
        ]
        return max(peaks, key=lambda m: m.total)

    # vLLM -----------------------------------------------------------------------------------------

    def _engine_share(self) -> float:
        """Return the share of the trainer's GPU that the engine may have."""
        rollout = self.cfg.rollout
        if rollout.engine != "vllm" or rollout.vllm.own_gpus:
            return 0.0
        return rollout.vllm.gpu_memory_utilization

    def _by_engine(self) -> Moment:
        terms = {} if not self._engine_sleeps() else {"vLLM engine": self._engine_bytes()}
        return Moment(ENGINE, terms)

    def _engine_sleeps(self) -> bool:
        return self.cfg.rollout.sleeps

    def _engine_bytes(self) -> int:
        return int(self._engine_share() * (self.memory or 0))


def recomputed_blocks(option: Checkpointing) -> bool | int:
    """Return what `Update.checkpointing` is for an option; for ``auto`` the least memory."""
    return True if option == "auto" else option


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:,.1f}"

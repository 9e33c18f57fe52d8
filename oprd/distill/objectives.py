"""The weighted sum of objectives that a run minimises (Eq. 7).

All objectives share one rollout, one teacher forward and one student forward. ``oprd`` compares
hidden states; ``opd_*`` compare next-token distributions (`vocab_losses`).

Shapes: B sequences of T tokens, M supervised tokens, V vocabulary, d hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oprd import distributed
from oprd.config import DistillConfig, OpdConfig
from oprd.data.collate import Batch
from oprd.data.supervision import Supervision, supervise
from oprd.distill.chunked import chunked
from oprd.distill.diagnostics import Sample, evenly, measure, places
from oprd.distill.distiller import Distiller
from oprd.distill.taps import RepOutput
from oprd.distill.vocab_losses import VocabLoss, materialised
from oprd.distributed.fsdp import reshard
from oprd.models.decoder import Decoder, find_decoder
from oprd.models.lm_head import HeadRows, LMHead
from oprd.models.packing_check import check_packing
from oprd.models.self_check import check_head

REP = "oprd"


@dataclass(frozen=True)
class Chosen:
    """The supervised tokens of a batch.

    Attributes:
        rep: the tokens of the representation loss; None if it is not used.
        opd: the tokens of the output-space losses; None if there are none. These losses use the
            state that predicts a token, and all tokens of the responses.
    """

    rep: Supervision | None
    opd: Supervision | None

    def to(self, device: torch.device) -> Chosen:
        """Return them on a device; on a GPU the copies are queued."""
        return Chosen(
            None if self.rep is None else self.rep.to(device),
            None if self.opd is None else self.opd.to(device),
        )


@dataclass(frozen=True)
class Teacher:
    """A teacher and the parts of it that the objectives need.

    Attributes:
        distiller: the student's taps with this teacher; None if no hidden states are compared.
        model, decoder: the whole teacher; None if no distributions are compared.
        shared_ids: the number of token ids that distributions are compared over; None: all that
            both models have.
    """

    distiller: Distiller | None
    model: PreTrainedModel | None = None
    decoder: Decoder | None = None
    shared_ids: int | None = None

    @property
    def has_final_states(self) -> bool:
        """Whether the last states that are compared are the final ones of both models."""
        d = self.distiller
        if d is None or d.projectors is not None:
            return False
        return d.pairs[-1] == (d.student.num_layers - 1, d.teacher_layers - 1)

    @property
    def run(self) -> Decoder:
        """The decoder that is run: the whole one, or only the layers that are compared."""
        if self.decoder is not None:
            return self.decoder
        assert self.distiller is not None
        return self.distiller.teacher


@dataclass
class TeacherPass:
    """The outputs of a teacher's forward pass that the objectives need.

    Attributes:
        teacher: the teacher that was run.
        states: L tensors (M, d), if hidden states are compared.
        last_Md: final hidden states at the positions that predict supervised tokens, if logits are
            computed in chunks.
        logits_BTV: the logits of all positions, if logits are materialised.
    """

    teacher: Teacher
    states: list[Tensor] = field(default_factory=list)
    last_Md: Tensor | None = None
    logits_BTV: Tensor | None = None

    def release(self) -> None:
        """Free the teacher's weights that FSDP2 has gathered.

        Call this after the losses are computed. FSDP2 would free them only in a backward pass,
        which the teacher does not have.
        """
        reshard(self.teacher.run.root)


@dataclass(frozen=True)
class StudentPass:
    """Result of a student forward pass.

    Attributes:
        loss: the weighted sum of the losses; call ``backward`` on it.
        parts: each objective's loss before weighting, detached.
        rep: loss and statistics of the representation loss; None if it is not used.
        sample: what `Objectives.diagnose` needs; None if it was not asked for.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    rep: RepOutput | None
    sample: Sample | None = None


class Objectives:
    """A weighted sum of objectives on a student and its teachers."""

    def __init__(
        self,
        weights: Mapping[str, float],
        student: PreTrainedModel,
        teachers: Mapping[str, PreTrainedModel],
        distillers: Mapping[str, Distiller],
        distill: DistillConfig,
        opd: OpdConfig,
        temperature: float = 1.0,
        shared_ids: Mapping[str, int | None] = MappingProxyType({}),
        heads: Mapping[str, LMHead] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            weights: weight of each objective; `oprd.config.OBJECTIVES` lists the names.
            teachers: the teachers by name.
            distillers: the student's taps with each teacher, if ``oprd`` is an objective.
            distill: options that select the supervised tokens.
            opd: options of the output-space losses.
            temperature: the temperature at which rollouts are sampled.
            shared_ids: by name of a teacher that shares the student's token ids, their number if
                the teacher has more; else None.
            heads: by teacher name, heads that are kept for diagnostics alone.
        """
        self.weights = dict(weights)
        self.distill, self.opd = distill, opd
        self.temperature, self.shared_ids, self.heads = temperature, shared_ids, heads
        self.vocab = {
            name: VocabLoss(opd.form(name), opd.k, opd.support, temperature)
            for name in weights
            if name != REP
        }
        self.student, self.decoder = student, find_decoder(student)
        self.materialised = opd.implementation == "materialised"
        if self.vocab and not self.materialised:
            LMHead.of(student)  # raises for heads that it does not support
        self.teachers = {
            name: self._teacher(model, distillers.get(name), shared_ids.get(name))
            for name, model in teachers.items()
        }

    def _teacher(
        self, model: PreTrainedModel, distiller: Distiller | None, shared_ids: int | None
    ) -> Teacher:
        if not self.vocab:  # keep only the part that the distiller needs
            return Teacher(distiller)
        if not self.materialised:
            LMHead.of(model)
        return Teacher(distiller, model, find_decoder(model), shared_ids)

    @property
    def distiller(self) -> Distiller | None:
        """The first teacher's distiller; None if no hidden states are compared."""
        return next(iter(self.teachers.values())).distiller

    def check_models(self) -> None:
        """Run all models on a few tokens, and check that they are built as OPRD assumes.

        This is a collective operation: every rank must call it.

        Raises:
            ConfigError: for the first model that is not, see `oprd.models.self_check`.
        """
        uses_heads = bool(self.vocab) and not self.materialised
        if uses_heads:
            check_head(self.student, self.decoder, "student")
        for name, teacher in self.teachers.items():
            if teacher.distiller is not None:
                teacher.distiller.check()
            if uses_heads:
                assert teacher.decoder is not None
                check_head(teacher.model, teacher.decoder, f"teacher {name}".strip())

    def check_packing(self) -> None:
        """Check that all models keep packed sequences separate.

        Raises:
            ConfigError: for the first model that does not.
        """
        check_packing(self.decoder, "student")
        for name, teacher in self.teachers.items():
            check_packing(teacher.run, f"teacher {name}".strip())

    def supervise(self, batch: Batch) -> Chosen:
        """Select the supervised tokens of a batch."""
        d, mask = self.distill, batch.response_mask
        where = {"partner_BT": batch.partner, "position_ids_BT": batch.position_ids}
        rep = opd = None
        if REP in self.weights:
            rep = supervise(mask, d.positions, d.k, d.shift, d.reduction, **where)
        if self.vocab:
            opd = supervise(mask, "all", d.k, "before", d.reduction, **where)
        return Chosen(rep, opd)

    def totals(self, chosen: Sequence[Chosen], device: torch.device) -> dict[str, float]:
        """Return the denominator of each objective's mean over the global batch.

        This is a collective operation: every rank must call it.

        Args:
            chosen: the supervised tokens of this rank's micro-batches.
        """
        counts = [
            sum(c.rep.total for c in chosen if c.rep),
            sum(c.opd.total for c in chosen if c.opd),
        ]
        rep, opd = distributed.sum_over_ranks(counts, device)
        return {name: rep if name == REP else opd for name in self.weights}

    @torch.no_grad()
    def teacher_pass(self, batch: Batch, chosen: Chosen, name: str) -> TeacherPass:
        """Run the teacher ``name`` on a batch."""
        teacher = self.teachers[name]
        read = batch.for_teacher
        if teacher.model is None:
            assert teacher.distiller is not None
            assert chosen.rep is not None
            rows = chosen.rep.teacher_rows
            states = teacher.distiller.teacher_states(
                read.input_ids, read.attention_mask, rows, read.position_ids
            )
            return TeacherPass(teacher, states)
        assert chosen.opd is not None
        assert teacher.decoder is not None
        capture: contextlib.AbstractContextManager = contextlib.nullcontext()
        if teacher.distiller:
            assert chosen.rep is not None
            capture = teacher.distiller.capture_teacher(chosen.rep.teacher_rows)
        was_training = teacher.model.training  # True if it is the student itself
        teacher.model.eval()
        result = TeacherPass(teacher)
        with capture as captured:
            if self.materialised:
                result.logits_BTV = _logits(teacher.model, read)[..., : teacher.shared_ids]
            else:
                hidden = teacher.decoder.forward(
                    read.input_ids, read.attention_mask, read.position_ids
                )
                result.last_Md = hidden.flatten(0, 1)[chosen.opd.teacher_rows]
        teacher.model.train(was_training)
        if captured is not None:
            result.states = captured()
        return result

    def student_pass(
        self,
        batch: Batch,
        chosen: Chosen,
        teacher: TeacherPass,
        totals: Mapping[str, float],
        sampled: int = 0,
    ) -> StudentPass:
        """Run the student on a batch and compute the losses.

        Args:
            totals: for each objective, the denominator of its mean over the global batch.
            sampled: number of positions to keep for `diagnose`.
        """
        session: contextlib.AbstractContextManager = contextlib.nullcontext()
        distiller = teacher.teacher.distiller
        if distiller:
            assert chosen.rep is not None
            session = distiller.taps(
                teacher.states, chosen.rep.rows, chosen.rep.weights, totals[REP]
            )
        with session as taps:
            if self.vocab and self.materialised:
                output = _logits(self.student, batch)
            else:
                output = self.decoder.forward(
                    batch.input_ids, batch.attention_mask, batch.position_ids
                )
        rep = None if taps is None else taps.output()
        losses = {} if rep is None else {REP: rep.loss}
        for name in self.vocab:
            losses[name] = self._vocab_loss(name, batch, chosen, teacher, output, totals[name])
        terms = [self.weights[name] * loss for name, loss in losses.items()]
        parts = {name: loss.detach() for name, loss in losses.items()}
        sample = self._sample(batch, chosen, teacher, output, sampled) if sampled else None
        return StudentPass(torch.stack(terms).sum(), parts, rep, sample)

    def _sample(
        self, batch: Batch, chosen: Chosen, teacher: TeacherPass, output: Tensor, number: int
    ) -> Sample:
        """Keep the models' final states, or logits, at some of the supervised positions."""
        where = chosen.opd or chosen.rep
        assert where is not None
        some = evenly(len(where.rows), number, output.device)
        rows = where.rows[some]
        theirs = None
        if teacher.logits_BTV is not None:
            theirs = teacher.logits_BTV.flatten(0, 1)[where.teacher_rows[some]]
        elif teacher.last_Md is not None:
            theirs = teacher.last_Md[some]
        elif teacher.teacher.has_final_states:
            theirs = teacher.states[-1][some]
        ours = output.detach().flatten(0, 1)[rows]
        # The state before a token predicts it.
        predicts = chosen.opd is not None or self.distill.shift == "before"
        place = places(batch.response_mask, rows + 1 if predicts else rows)
        return Sample(ours, theirs, self.materialised and bool(self.vocab), place)

    def diagnose(self, sample: Sample, name: str) -> dict[str, list[float]]:
        """Measure what no objective needs on a sample; see `oprd.distill.diagnostics.measure`.

        Args:
            name: the name of the teacher that the sample is of.
        """
        teacher, head = self.teachers[name], None
        if name in self.shared_ids:
            head = self.heads.get(name) or LMHead.tied(teacher.run.backbone)
            if teacher.model is not None:
                head = LMHead.of(teacher.model)
        shared = self.shared_ids.get(name)
        return measure(sample, LMHead.of(self.student), head, shared, self.temperature)

    def _vocab_loss(
        self,
        name: str,
        batch: Batch,
        chosen: Chosen,
        teacher: TeacherPass,
        output: Tensor,
        total: float,
    ) -> Tensor:
        opd = chosen.opd
        assert opd is not None
        tokens_M = batch.input_ids.flatten()[opd.rows + 1]
        if self.materialised:
            assert teacher.logits_BTV is not None
            return materialised(
                self.vocab[name],
                output,
                teacher.logits_BTV,
                opd.rows,
                tokens_M,
                opd.weights,
                total,
                opd.teacher_rows,
            )
        last_Md = teacher.last_Md
        assert last_Md is not None
        # Not cached: while FSDP2 has gathered the head, its weight is a different tensor.
        theirs = HeadRows(LMHead.of(teacher.teacher.model), last_Md, teacher.teacher.shared_ids)
        return chunked(
            self.vocab[name],
            output.flatten(0, 1)[opd.rows],
            LMHead.of(self.student),
            theirs,
            tokens_M,
            opd.weights,
            total,
            self.opd.chunk_tokens,
        )


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the model's own logits (B, T, V) of all positions."""
    decoder = find_decoder(model)
    inputs = decoder.inputs(batch.input_ids, batch.attention_mask, batch.position_ids)
    return model(**inputs, use_cache=False).logits

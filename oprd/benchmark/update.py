"""The actor update alone, on given rollouts and precomputed teacher outputs, timed in parts.

An update is forward, loss and backward into preallocated gradients, without optimizer step and
teacher forward. Its parts are the times between points that the update passes (the LM head's call,
the arrival of a gradient, a tap), so that they add up to the whole.

Shapes: B sequences of T tokens, M supervised rows, d hidden width, L blocks, V vocabulary.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oprd.data.supervision import supervise
from oprd.distill.chunked import chunked
from oprd.distill.distiller import Distiller, attach
from oprd.distill.taps import TapSession
from oprd.distill.vocab_losses import VocabLoss, materialised
from oprd.memory_plan.objectives import PLANNER_OBJECTIVES, LossForm
from oprd.models.decoder import find_decoder
from oprd.models.lm_head import HeadRows, LMHead
from oprd.observability.memory import PeakMemory
from oprd_kernels import ops

BACKBONE_FORWARD, BACKBONE_BACKWARD = "backbone forward", "backbone backward"
HEAD_FORWARD, HEAD_BACKWARD = "LM head forward", "LM head backward"
LOSS, LOSS_BACKWARD, TERM = "loss from logits", "loss backward", "distillation term"
TEACHER_HEAD = "teacher's LM head"
PARTS = (
    BACKBONE_FORWARD,
    HEAD_FORWARD,
    TEACHER_HEAD,
    LOSS,
    LOSS_BACKWARD,
    HEAD_BACKWARD,
    TERM,
    BACKBONE_BACKWARD,
)


class Laps:
    """A stopwatch of seconds by part: each call adds the time since the last one to a part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float] = defaultdict(float)
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, part: str) -> None:
        """Add the time since the last call to ``part``."""
        now = self._now()
        self.parts[part] += now - self._last
        self._last = now


@dataclass(frozen=True)
class Sample:
    """The measurement of one update: seconds by part, and bytes (None if not measurable)."""

    parts: dict[str, float]
    delta_peak: int | None


@dataclass
class Measured:
    """The measurements of one objective over all rounds.

    Attributes:
        seconds: seconds of the whole update, by timed round.
        parts: seconds of each part, by timed round.
        delta_peaks: delta-peaks in bytes, by round that measured memory.
    """

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    delta_peaks: list[int | None] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Add the seconds of a timed round."""
        self.seconds.append(sum(sample.parts.values()))
        self.parts.append(sample.parts)


@dataclass
class Ready:
    """The teacher's outputs, computed before the update begins.

    Attributes:
        states: outputs of each block (of the final norm for the last block), (M, d).
        bridged: the projected states, (M, r) float32; empty without Bridge.
        last: the states that the teacher's LM head reads, (M, d).
        logits: the logits, (B, T, V); None if no materialised loss reads them.
    """

    states: list[Tensor]
    bridged: list[Tensor]
    last: Tensor
    logits: Tensor | None


class ActorUpdate:
    """The updates of every objective with one student on one batch of rollouts.

    Args:
        student: a causal LM; it is put into training mode and gets zeroed gradients.
        teacher: another causal LM of the same width; None: the student's own weights. Time and
            memory do not depend on the values of the weights.
        batch, tokens, prompt: B sequences of T random tokens, of which ``prompt`` are not
            supervised.
        k: number of tokens in the top-k objectives. The form of ``topk`` is that of
            github.com/ShenzhiYang2000/OPRD: a detached advantage from log-probs over the whole
            vocabulary. ``topk_set`` is Eq. 5, both distributions renormalised on the set.
        rank: r, the rank of the Bridge's random projectors.
        chunk: number of rows per chunk in the chunked losses; None: as in training.
        with_logits: keep the teacher's [B, T, V] logits for the materialised losses.
        with_bridge: project the teacher's states.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        *,
        batch: int,
        tokens: int,
        prompt: int,
        k: int = 16,
        rank: int = 8,
        chunk: int | None = None,
        with_logits: bool = True,
        with_bridge: bool = True,
        seed: int = 0,
    ) -> None:
        self.student, self.teacher = student, student if teacher is None else teacher
        self.decoder, self.head = find_decoder(student), LMHead.of(student)
        self.teacher_head = LMHead.of(self.teacher)
        self.chunk = chunk
        self.device = self.head.weight.device
        student.train()
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.manual_seed(seed)
        vocab = min(self.head.weight.shape[0], self.teacher_head.weight.shape[0])
        self.ids = torch.randint(vocab, (batch, tokens), device=self.device)
        response = torch.zeros_like(self.ids, dtype=torch.bool)
        response[:, prompt:] = True
        chosen = supervise(response, "all", shift="before")
        self.rows, self.count = chosen.rows, chosen.total
        self.sampled = self.ids.flatten()[self.rows + 1]
        d, dtype = self.decoder.width, self.head.weight.dtype
        self.end_gradient = 1e-3 * torch.randn(batch, tokens, d, device=self.device, dtype=dtype)
        shape = (self.decoder.num_layers, rank, d)
        self.projectors = torch.randn(shape, device=self.device) / d**0.5
        self.losses: dict[LossForm, VocabLoss] = {
            "top1": VocabLoss("top1"),
            "topk": VocabLoss("topk_advantage", k=k),
            "topk_set": VocabLoss("topk", k=k),
            "full": VocabLoss("full"),
        }
        self.ready = self._ask_teacher(with_logits, with_bridge)

    def _ask_teacher(self, with_logits: bool, with_bridge: bool) -> Ready:
        """Compute the teacher's outputs, with noise to make them differ from the student's."""
        with self.tapped("all") as distiller:
            states = distiller.teacher_states(self.ids, None, self.rows)
        for s in states:
            s.add_(0.1 * s.float().std() * torch.randn_like(s))
        bridged = []
        if with_bridge:
            bridged = [s.float() @ p.T for s, p in zip(states, self.projectors, strict=True)]
        logits = None
        if with_logits:
            # Supervised rows get the noisy states. Other rows are never read, so any values do.
            every = self.end_gradient.flatten(0, 1).to(states[-1].dtype, copy=True)
            every[self.rows] = states[-1]
            narrow = HeadRows(self.teacher_head, every).logits(slice(None)).to(every.dtype)
            logits = narrow.view(*self.ids.shape, -1)
        return Ready(states, bridged, states[-1], logits)

    @contextmanager
    def tapped(self, layers: str) -> Iterator[Distiller]:
        """Attach a distiller to the student inside the block."""
        distiller = attach(
            self.student, self.teacher, layers=layers, kind="mse", positions="all", shift="before"
        )
        try:
            yield distiller
        finally:
            distiller.detach()

    def zero_gradients(self) -> None:
        """Zero the gradients in place, so that they stay resident."""
        for parameter in self.student.parameters():
            parameter.grad.zero_()

    def measure(self, objective: str) -> Sample:
        """Run and measure one update (or the log-prob forward)."""
        self.zero_gradients()
        with self.prepared(objective) as run:
            gc.collect()
            with PeakMemory(self.device) as peak:
                laps = Laps(self.device)
                run(laps)
        return Sample(dict(laps.parts), peak.delta)

    @contextmanager
    def prepared(self, objective: str) -> Iterator[Callable[[Laps], None]]:
        """Yield the function that runs an objective's update, with its taps attached."""
        chosen = PLANNER_OBJECTIVES[objective]
        if not chosen.has_backward:
            yield self._logprob
        elif chosen.taps is not None:
            with self.tapped(chosen.taps) as distiller:
                yield lambda laps: self._oprd(distiller, chosen.is_projected, laps)
        elif chosen.loss is not None:
            loss = self.losses[chosen.loss]
            update = self._chunked if chosen.is_chunked else self._materialised
            yield lambda laps: update(loss, laps)
        else:
            yield self._backbone

    def _backbone(self, laps: Laps) -> None:
        states = self.decoder.forward(self.ids)
        laps(BACKBONE_FORWARD)
        states.backward(self.end_gradient)
        laps(BACKBONE_BACKWARD)

    def _oprd(self, distiller: Distiller, bridge: bool, laps: Laps) -> None:
        targets = self.ready.bridged if bridge else self.ready.states[-len(distiller.pairs) :]
        with distiller.taps(targets, self.rows, denominator=float(self.count)) as session:
            if bridge:
                session.student_proj = lambda index, _device: self.projectors[index]
                session.options["kind"] = "nmse"
            session.tap = _timed_tap(session, laps)  # type: ignore
            self.decoder.forward(self.ids)
        laps(BACKBONE_FORWARD)
        loss = session.output().loss
        laps(TERM)
        with _timed_tap_backward(laps):
            loss.backward()
        laps(BACKBONE_BACKWARD)

    @contextmanager
    def _timed_head(self, laps: Laps) -> Iterator[None]:
        """Time the student's LM head, its backward and the parts before them inside the block."""

        def before(_module, args) -> None:
            laps(BACKBONE_FORWARD)
            if args[0].requires_grad:
                args[0].register_hook(lambda _grad: laps(HEAD_BACKWARD))

        def after(_module, _args, logits) -> None:
            laps(HEAD_FORWARD)
            if logits.requires_grad:
                logits.register_hook(lambda _grad: laps(LOSS_BACKWARD))

        head = self.student.get_output_embeddings()
        hooks = (head.register_forward_pre_hook(before), head.register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _materialised(self, loss: VocabLoss, laps: Laps) -> None:
        if self.ready.logits is None:
            raise ValueError("materialised losses need ActorUpdate(with_logits=True)")
        with self._timed_head(laps):
            value = materialised(
                loss,
                self.student(input_ids=self.ids, use_cache=False).logits,
                self.ready.logits,
                self.rows,
                self.sampled,
                None,
                self.count,
            )
            laps(LOSS)
            value.backward()
            laps(BACKBONE_BACKWARD)

    def _chunked(self, loss: VocabLoss, laps: Laps) -> None:
        states = self.decoder.forward(self.ids).flatten(0, 1)[self.rows]
        states.register_hook(lambda _grad: laps(HEAD_BACKWARD))
        laps(BACKBONE_FORWARD)
        teacher = _TimedRows(self.teacher_head, self.ready.last, laps)
        head = _TimedHead(
            self.head.weight, self.head.bias, self.head.softcap, self.head.scale, laps=laps
        )
        count = self.count
        value = chunked(loss, states, head, teacher, self.sampled, None, count, self.chunk)
        laps(HEAD_BACKWARD)  # of the last chunk
        value.backward()
        laps(BACKBONE_BACKWARD)

    @torch.no_grad()
    def _logprob(self, laps: Laps) -> None:
        """Compute log-probs of the sampled tokens, as OPD code often does once before an update."""
        with self._timed_head(laps):
            logits = self.student(input_ids=self.ids, use_cache=False).logits
            rows_MV = logits.flatten(0, 1).float()[self.rows]
            chosen = rows_MV.gather(-1, self.sampled[:, None]).squeeze(-1)
            (chosen - rows_MV.logsumexp(-1)).sum()
        laps(LOSS)

    @torch.no_grad()
    def teacher_seconds(self, what: str) -> float:
        """Return the seconds of one forward of the teacher.

        Args:
            what: ``states`` (the rows of every block), ``last`` (the rows of the last block,
                without the LM head) or ``logits``.
        """
        if what == "logits":
            was_training = self.teacher.training
            self.teacher.eval()
            laps = Laps(self.device)
            self.teacher(input_ids=self.ids, use_cache=False)
            laps(what)
            self.teacher.train(was_training)
        else:
            with self.tapped("all" if what == "states" else "last") as distiller:
                laps = Laps(self.device)
                distiller.teacher_states(self.ids, None, self.rows)
                laps(what)
        return laps.parts[what]


@dataclass(frozen=True)
class _TimedHead(LMHead):
    """A student's LM head that times its logits; a chunk's gradient counts as the backward."""

    laps: Laps = field(kw_only=True)

    def products(self, states_md: Tensor, operand_Vd: Tensor) -> Tensor:
        self.laps(HEAD_BACKWARD)  # with which the previous chunk ended
        products = super().products(states_md, operand_Vd)
        self.laps(HEAD_FORWARD)
        return products

    def backward_states(self, d_products_mV: Tensor, operand_Vd: Tensor) -> Tensor:
        self.laps(LOSS)
        return super().backward_states(d_products_mV, operand_Vd)

    def backward_states_of(
        self, d_products_mk: Tensor, tokens_mk: Tensor, operand_Vd: Tensor
    ) -> Tensor:
        self.laps(LOSS)
        return super().backward_states_of(d_products_mk, tokens_mk, operand_Vd)


class _TimedRows(HeadRows):
    """A teacher's logits, timed."""

    def __init__(self, head: LMHead, states_Md: Tensor, laps: Laps) -> None:
        super().__init__(head, states_Md)
        self.laps = laps

    def logits(self, at: slice) -> Tensor:
        self.laps(LOSS)
        logits = super().logits(at)
        self.laps(TEACHER_HEAD)
        return logits

    def logits_of(self, at: slice, tokens_mk: Tensor) -> Tensor:
        self.laps(LOSS)
        logits = super().logits_of(at, tokens_mk)
        self.laps(TEACHER_HEAD)
        return logits


def _timed_tap(session: TapSession, laps: Laps) -> Callable[[int, Tensor], Tensor]:
    """Return the session's tap with timing."""
    plain = session.tap

    def tap(index: int, h: Tensor) -> Tensor:
        laps(BACKBONE_FORWARD)
        h = plain(index, h)
        laps(TERM)
        return h

    return tap


@contextmanager
def _timed_tap_backward(laps: Laps) -> Iterator[None]:
    """Time the gradients of the taps inside the block.

    Hooks on the graph are not used: they would keep references to the gradients that a tap adds
    into, so that the tap would have to copy them.
    """
    plain = ops.grad_student

    def timed(ctx, grad_loss: Tensor, into: Tensor | None = None) -> Tensor:
        laps(BACKBONE_BACKWARD)
        gradient = plain(ctx, grad_loss, into=into)
        laps(TERM)
        return gradient

    ops.grad_student = timed
    try:
        yield
    finally:
        ops.grad_student = plain

"""Representation distillation for a pair of Hugging Face decoders.

    distiller = attach(student, teacher, layers="all", kind="mse")
    out = distiller(input_ids, attention_mask, response_mask)
    out.loss.backward()

The teacher runs without its LM head and only up to the deepest compared layer; only the supervised
rows of its hidden states are kept. The student's hidden states pass through `rep_tap`, which adds
the loss's gradient during backward. The student is run by its own call, so that what a trainer has
wrapped around it (autocast, DistributedDataParallel) holds. Neither LM head is computed.

Shapes: B sequences of T tokens, M supervised rows, L compared layers, d hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from oprd.bridge.bank import Bridge
from oprd.bridge.project import Projectors
from oprd.config import DistillOptions
from oprd.config.types import BackendName, Kind, Positions, Reduction, Shift
from oprd.data.collate import Batch
from oprd.data.supervision import Supervision, supervise
from oprd.distill.taps import Board, RepOutput, TapSession, tapped_class, unwrapped, without_head
from oprd.models.decoder import find_decoder, watch
from oprd.models.info import ModelInfo
from oprd.models.layer_pairs import LayerSpec, pair_layers
from oprd.models.self_check import check_states, cut_if_it_runs
from oprd_kernels.validate import KINDS


class Distiller:
    """A student with taps and the part of the teacher that they need, created by `attach`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        options: DistillOptions,
        bridge: Bridge | None = None,
    ) -> None:
        if options.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {options.kind!r}")
        self.student, self.options = find_decoder(unwrapped(student)), options
        self._call = student
        self._take_teacher(teacher, bridge)
        self._board = Board()
        self._points = [self._add_tap(i, block) for i, (block, _) in enumerate(self.pairs)]

    def _take_teacher(self, teacher: nn.Module, bridge: Bridge | None) -> None:
        teacher_decoder = find_decoder(teacher)
        self.pairs = pair_layers(
            self.options.layers, self.student.num_layers, teacher_decoder.num_layers
        )
        if bridge is not None:
            ours, theirs = (
                ModelInfo(d.width, d.num_layers) for d in (self.student, teacher_decoder)
            )
            bridge.info.check(ours, theirs, self.pairs)
        elif self.student.width != teacher_decoder.width:
            raise ValueError(
                f"the student is {self.student.width} wide and the teacher "
                f"{teacher_decoder.width}: without a bridge, OPRD compares equal widths. Fit one "
                "with oprd-bridge fit and pass bridge=load_bridge(file), or choose a teacher of "
                "the student's width"
            )
        self.projectors = None if bridge is None else Projectors(bridge)
        self.compared_width = self.student.width if bridge is None else bridge.info.rank
        """D, the width that `nmse` divides by."""
        self.teacher = teacher_decoder
        if not isinstance(teacher_decoder.root, FSDPModule):  # FSDP2 can't drop layers
            deepest = max(block for _, block in self.pairs)
            self.teacher = cut_if_it_runs(teacher_decoder, deepest + 1)
        self.teacher_layers = teacher_decoder.num_layers

    def _add_tap(self, index: int, block: int) -> nn.Module:
        module: Any = self.student.state_module(block, self.student.num_layers)
        if "_oprd_tap" in module.__dict__:
            raise ValueError("the student already has taps: call detach() on its Distiller first")
        module.__class__ = tapped_class(type(module))
        module._oprd_tap = (self._board, index)
        return module

    def with_teacher(self, teacher: nn.Module, bridge: Bridge | None = None) -> Distiller:
        """Return a `Distiller` with the same student, taps and options but another teacher.

        All such distillers share the student's taps: any of them can open the taps, and `detach`
        of one removes them for all.

        Raises:
            ValueError: if student and teacher do not fit together, as in `attach`.
        """
        other = copy.copy(self)
        other._take_teacher(teacher, bridge)
        return other

    def check(self) -> None:
        """Run both models on a few tokens, and check that what is compared are hidden states.

        If a model is sharded, all ranks must call this together.

        Raises:
            ConfigError: see `oprd.models.self_check.check_states`.
        """
        ours, theirs = zip(*self.pairs, strict=True)
        check_states(self.student, ours, self.student.num_layers, "student")
        check_states(self.teacher, theirs, self.teacher_layers, "teacher")

    def freeze_unreached(self) -> list[str]:
        """Freeze the student's parameters that this loss gives no gradient.

        These are an LM head that is not tied to the embeddings, and the blocks above the deepest
        compared layer. DistributedDataParallel without ``find_unused_parameters`` waits for a
        gradient of every parameter that requires one, so call this before wrapping the student, if
        the representation loss is the only loss.

        Returns:
            The names of the parameters that were frozen, as in ``named_parameters``.
        """
        decoder, deepest = self.student, max(block for block, _ in self.pairs)
        above = list(decoder.layers[deepest + 1 :])
        if deepest < decoder.num_layers - 1:
            above.append(decoder.norm)
        unreached = {p for module in above for p in module.parameters()}
        reached = set(decoder.backbone.parameters()) - unreached
        frozen = []
        for name, parameter in decoder.root.named_parameters():
            if parameter not in reached and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(name)
        return frozen

    def supervise(
        self,
        response_mask: Tensor,
        partner: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Supervision:
        """Select the states of a batch that are compared, by the options of `attach`.

        ``.rows`` and ``.weights`` are what `teacher_states` and `taps` take. ``.total`` is the
        batch's part of the denominator: the ``denominator`` of a batch that is split into parts is
        the sum of the totals of its parts.

        Args:
            response_mask, partner, position_ids: as in a call of the distiller.
        """
        o = self.options
        return supervise(
            response_mask.bool(),
            o.positions,
            o.k,
            o.shift,
            o.reduction,
            partner,
            position_ids_BT=position_ids,
        )

    def detach(self) -> None:
        """Remove the taps from the student."""
        for module in self._points:
            module.__dict__.pop("_oprd_tap", None)
            # If FSDP2 has subclassed the class since, it is kept: without a tap it does nothing.
            module.__class__ = vars(type(module)).get("_oprd_original", type(module))
        self._points.clear()

    @torch.no_grad()
    def teacher_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: Tensor,
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Run the teacher and return its hidden states at the supervised rows.

        Args:
            input_ids: (B, T) int64, the student's rollouts in the form that the teacher reads.
            attention_mask: (B, T), 0 for padding; None: no padding.
            rows: (M,) int64, the supervised rows of the (B * T, d) hidden states.
            position_ids: (1, T) int64, if sequences are packed in one row; see
                `oprd.models.decoder`.

        Returns:
            One tensor for each compared layer: (M, d) in the teacher's dtype, or with a bridge the
            projected states (M, r) in float32.
        """
        # Restored for each module: the teacher may be the student itself, and `train()` of the
        # student does not reach the modules of a cut backbone.
        modes = [(module, module.training) for module in self.teacher.backbone.modules()]
        self.teacher.backbone.eval()
        try:
            with self.capture_teacher(rows) as states:
                self.teacher.forward(input_ids, attention_mask, position_ids)
        finally:
            for module, training in modes:
                module.training = training
        return states()

    @contextmanager
    def capture_teacher(self, rows: Tensor) -> Iterator[Callable[[], list[Tensor]]]:
        """Capture the teacher's hidden states at the supervised rows during its next forward pass.

        The teacher may be called in any way inside the context. The context yields a function that
        returns the states in the form of `teacher_states`.
        """
        states: dict[int, Tensor] = {}
        pairs = {pair[1]: pair for pair in self.pairs}

        def keep(block: int, h: Tensor) -> None:
            states[block] = self._kept(pairs[block], h.flatten(0, -2), rows)

        with watch(self.teacher, pairs, self.teacher_layers, keep):
            yield lambda: [states[block] for block in pairs]

    def _kept(self, pair: tuple[int, int], states: Tensor, rows: Tensor) -> Tensor:
        """Select the supervised rows of a teacher layer's states (N, dT).

        With a bridge the rows are projected at once (Eq. 14), so that full-width states are freed
        with the layer.
        """
        if self.projectors is None:
            return states[rows]
        return self.projectors.teacher(pair[0], states, rows)

    def _student_proj(self, index: int, device: torch.device) -> Tensor:
        assert self.projectors is not None
        return self.projectors.student(self.pairs[index][0], device)

    @contextmanager
    def taps(
        self,
        teacher_states: Sequence[Tensor],
        rows: Tensor,
        weights: Tensor | None = None,
        denominator: float | Tensor | None = None,
        num_tokens: int | None = None,
    ) -> Iterator[TapSession]:
        """Compare the student's next forward pass with the teacher's states.

        The student may be called in any way inside the context, once:
        ``with distiller.taps(states, rows) as session: student(...)``, then
        ``session.output().loss.backward()``.

        Args:
            teacher_states, rows, weights, denominator: as in `student_loss`.
            num_tokens: B * T, if it should be checked that the student's states have as many rows.

        Raises:
            ValueError: if ``teacher_states`` has not one tensor for each compared layer.
            RuntimeError: if another context of this student is open, or after `detach`.
        """
        if len(teacher_states) != len(self.pairs):
            raise ValueError(
                f"teacher_states has {len(teacher_states)} tensors for {len(self.pairs)} layers"
            )
        if not self._points:
            raise RuntimeError("detach() has removed the student's taps: call oprd.attach again")
        if self._board.session is not None:
            raise RuntimeError("a `taps` context of this student is already open")
        options = {
            "rows": rows,
            "weights": weights,
            "denominator": denominator,
            "kind": self.options.kind,
            "backend": self.options.backend,
        }
        project = None if self.projectors is None else self._student_proj
        session = TapSession(teacher_states, options, project, num_tokens)
        self._board.session = session
        try:
            yield session
        finally:
            self._board.session = None

    def student_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: Tensor,
        teacher_states: Sequence[Tensor],
        weights: Tensor | None = None,
        denominator: float | Tensor | None = None,
        position_ids: Tensor | None = None,
        model: Callable[..., Any] | None = None,
    ) -> RepOutput:
        """Run the student on its rollouts, without its LM head, and compute the loss.

        Args:
            input_ids, attention_mask, rows, position_ids: as in `teacher_states`, for the student.
            teacher_states: the result of `teacher_states`.
            weights: (M,) row weights, see `oprd_kernels.fused_rep_loss`.
            denominator: denominator of the mean, if this batch is a part of a larger one: the
                number of supervised tokens in the whole batch.
            model: as in a call of the distiller.

        Raises:
            ValueError: if the student's states do not have a row for each of ``input_ids``, as with
                prompt tuning, or with `torch.nn.DataParallel`, which splits the batch.
        """
        inputs = self.student.inputs(input_ids, attention_mask, position_ids)
        tokens = input_ids.numel()
        with (
            self.taps(teacher_states, rows, weights, denominator, tokens) as session,
            without_head(self.student.root, session),
            self.student.running(),
        ):
            (model or self._call)(**inputs, use_cache=False)
        return session.output()

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        response_mask: Tensor,
        position_ids: Tensor | None = None,
        *,
        reading: Batch | None = None,
        partner: Tensor | None = None,
        denominator: float | Tensor | None = None,
        model: Callable[..., Any] | None = None,
    ) -> RepOutput:
        """Run teacher and student on a batch of the student's rollouts and compute the loss.

        The teacher runs in evaluation mode and in the dtype it was loaded in (or that of an
        autocast context around this call).

        Args:
            input_ids: (B, T) int64, prompts and responses.
            attention_mask: (B, T), 0 for padding on either side; None: no padding.
            response_mask: (B, T) bool, True for the tokens that the student generated, up to and
                including its first EOS.
            position_ids: (1, T) int64 for rollouts packed in one row, starting at 0 in each
                rollout; attention_mask must then be None.
                `oprd.models.packing_check.check_packing` checks that a model keeps packed rollouts
                separate.
            reading: the batch that the teacher reads, if it is not the student's: with another
                tokenizer or another prompt. `oprd.data.collate.collate` creates ``reading`` and
                ``partner`` from rollouts that have a `Reading`, for example from
                `oprd.tokenizers.alignment.Aligner`.
            partner: (B, T) int64, the teacher's row that each of the student's states is compared
                with, or -1.
            denominator: what the sum over this batch is divided by, if the batch is a part of a
                larger one, as with gradient accumulation: the sum of ``supervise(mask).total`` over
                all parts. Where DistributedDataParallel averages gradients over n ranks, the sum
                over all ranks, divided by n. None: this batch's own total.
            model: what is called to run the student, if a trainer has wrapped it since `attach`
                (the ``model`` that Hugging Face's `Trainer.compute_loss` gets). None: the student
                as `attach` got it.

        Raises:
            ValueError: if ``response_mask`` or ``attention_mask`` does not have the shape of
                ``input_ids``, a response token is masked as padding, only one of ``reading`` and
                ``partner`` is given, or ``partner`` does not have the shape of ``input_ids``.
        """
        _check_masks(input_ids, attention_mask, response_mask)
        if (reading is None) != (partner is None):
            raise ValueError(
                "reading and partner belong together: pass both from a Batch that "
                "oprd.data.collate.collate made, or neither"
            )
        if partner is not None and partner.shape != input_ids.shape:
            raise ValueError(
                f"partner has shape {tuple(partner.shape)} and input_ids {tuple(input_ids.shape)}: "
                "they must be equal, as in a Batch that oprd.data.collate.collate made"
            )
        chosen = self.supervise(response_mask, partner, position_ids)
        read = reading or Batch(input_ids, attention_mask, response_mask, position_ids=position_ids)
        states = self.teacher_states(
            read.input_ids, read.attention_mask, chosen.teacher_rows, read.position_ids
        )
        return self.student_loss(
            input_ids,
            attention_mask,
            chosen.rows,
            states,
            chosen.weights,
            max(chosen.total, 1) if denominator is None else denominator,
            position_ids,
            model,
        )


def _check_masks(input_ids: Tensor, attention_mask: Tensor | None, response_mask: Tensor) -> None:
    """Check that the masks say something about each of the tokens.

    Raises:
        ValueError: as in a call of `Distiller`.
    """
    masks = {"attention_mask": attention_mask, "response_mask": response_mask}
    for name, mask in masks.items():
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}: "
                "they must be equal, prompts and padding included. A mask of the responses alone "
                "must be padded with False on the prompts' side"
            )
    if attention_mask is not None and (response_mask.bool() & (attention_mask == 0)).any():
        raise ValueError(
            "response_mask is True for tokens that attention_mask marks as padding (0): the first "
            "EOS of a response is its last token, set response_mask to False after it"
        )


def attach(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layers: LayerSpec = DistillOptions.layers,
    kind: Kind = DistillOptions.kind,
    positions: Positions = DistillOptions.positions,
    k: int = DistillOptions.k,
    shift: Shift = DistillOptions.shift,
    reduction: Reduction = DistillOptions.reduction,
    backend: BackendName = DistillOptions.backend,
    bridge: Bridge | None = None,
) -> Distiller:
    """Attach OPRD's taps to a student and prepare its teacher.

    Both models run once on ten random tokens, to check that they are built as OPRD assumes.

    Args:
        student: a Hugging Face decoder, with or without LM head (Llama, Qwen2/3, Phi, Gemma,
            GPT-2, GPT-NeoX, ..), or one that DistributedDataParallel, accelerate or torch.compile
            has wrapped.
        teacher: a Hugging Face decoder, of the student's width unless there is a bridge. It is not
            changed, and its parameters get no gradient. The `Distiller` keeps only the part that
            it needs; delete your own reference to free the rest.
        layers: ``"last"``, ``"all"``, ``"even"``, ``"odd"`` or a list of student blocks, counted
            from 0. If the depths differ, layers are paired by relative depth (Eq. 11).
        kind: ``"mse"`` (Eq. 6), ``"nmse"`` or ``"cosine"``.
        positions, k, shift, reduction: see `oprd.data.supervision.supervise`.
        backend: see `oprd_kernels.fused_rep_loss`.
        bridge: frozen projectors from `oprd.bridge.load_bridge`. The loss is then computed between
            P_S h_S and P_T (h_T - mu_T) (Eq. 14-15), for models of any widths. The paper uses
            ``kind="nmse"`` with a bridge.

    Returns:
        A `Distiller`, which computes the loss of a batch.

    Raises:
        ValueError: if student and teacher do not fit together; the message says what to change.
    """
    blocks = layers if isinstance(layers, str) else list(layers)
    options = DistillOptions(kind, blocks, positions, k, shift, reduction, backend)
    distiller = Distiller(student, teacher, options, bridge)
    try:
        theirs = [block for _, block in distiller.pairs]
        check_states(find_decoder(teacher), theirs, distiller.teacher_layers, "teacher")
        distiller.check()
    except BaseException:
        distiller.detach()
        raise
    return distiller

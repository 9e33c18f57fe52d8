"""`attach`: OPRD on a pair of Hugging Face decoders.

    distiller = attach(student, teacher, layers="all", kind="mse")
    out = distiller(input_ids, attention_mask, response_mask)
    out.loss.backward()

The teacher runs without its LM head, only as deep as it is needed, and keeps only the supervised
rows. The student's hidden states pass `rep_tap`s, which add the loss's gradient as backpropagation
comes by. Neither LM head is called.

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
from oprd.data.supervision import supervise
from oprd.distill.taps import Board, RepOutput, TapSession, tapped_class
from oprd.models.decoder import cut, find_decoder, watch
from oprd.models.info import ModelInfo
from oprd.models.layer_pairs import LayerSpec, pair_layers
from oprd_kernels.validate import KINDS


class Distiller:
    """A student with taps and the part of its teacher that they need; made by `attach`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        options: DistillOptions,
        bridge: Bridge | None = None,
    ) -> None:
        if options.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {options.kind!r}")
        self.student, self.options = find_decoder(student), options
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
        """D: what `nmse` divides by."""
        self.teacher = teacher_decoder
        if not isinstance(teacher_decoder.root, FSDPModule):  # whose layers can't be taken apart
            self.teacher = cut(teacher_decoder, max(block for _, block in self.pairs) + 1)
        self.teacher_layers = teacher_decoder.num_layers

    def _add_tap(self, index: int, block: int) -> nn.Module:
        module: Any = self.student.state_module(block, self.student.num_layers)
        if "_oprd_tap" in module.__dict__:
            raise ValueError("the student already has taps: call detach() on its Distiller first")
        module.__class__ = tapped_class(type(module))
        module._oprd_tap = (self._board, index)
        return module

    def with_teacher(self, teacher: nn.Module, bridge: Bridge | None = None) -> Distiller:
        """The same student, its taps and everything else, with another teacher: for batches of
        which that one knows more. Any of them opens the taps, and `detach` of any removes them.

        Raises:
            ValueError: as `attach`.
        """
        other = copy.copy(self)
        other._take_teacher(teacher, bridge)
        return other

    def detach(self) -> None:
        """Take the taps off the student."""
        for module in self._points:
            module.__dict__.pop("_oprd_tap", None)
            # Unless FSDP2 has subclassed it since: then the tap-less call stays as it is.
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
        """The teacher's hidden states at the supervised rows, for each compared layer.

        Args:
            input_ids: (B, T) int64, the student's rollouts, as the teacher is to read them.
            attention_mask: (B, T), 0 for padding; None: no padding.
            rows: (M,) int64, of the (B * T, d) states.
            position_ids: (1, T) int64 of sequences packed in one row, see `oprd.models.decoder`.

        Returns:
            L tensors (M, d) in the teacher's dtype; with a bridge (M, r) float32, projected.
        """
        # Each layer's own: they may be the student's, and a cut backbone is not told by `train()`.
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
        """While open, a forward pass of the teacher, however it is called, leaves its hidden states
        at the supervised rows; the function yielded returns them, as `teacher_states` does."""
        states: dict[int, Tensor] = {}
        pairs = {pair[1]: pair for pair in self.pairs}

        def keep(block: int, h: Tensor) -> None:
            states[block] = self._kept(pairs[block], h.flatten(0, -2), rows)

        with watch(self.teacher, pairs, self.teacher_layers, keep):
            yield lambda: [states[block] for block in pairs]

    def _kept(self, pair: tuple[int, int], states: Tensor, rows: Tensor) -> Tensor:
        """What is kept of a teacher layer's states (N, dT): rows, or with a bridge what they are
        projected to (Eq. 14), so that full-width states never outlive the layer."""
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
    ) -> Iterator[TapSession]:
        """While open, the student's next forward pass, however it is called, is compared.

        ``with distiller.taps(states, rows) as session: student(...)``, then
        ``session.output().loss.backward()``. Arguments as `student_loss`.
        """
        if len(teacher_states) != len(self.pairs):
            raise ValueError(
                f"teacher_states has {len(teacher_states)} tensors for {len(self.pairs)} layers"
            )
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
        session = TapSession(teacher_states, options, project)
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
    ) -> RepOutput:
        """Run the student's backbone on its rollouts and compare.

        Args:
            input_ids, attention_mask, rows, position_ids: as given to `teacher_states`.
            teacher_states: what that returned.
            weights: (M,), see `oprd_kernels.fused_rep_loss`.
            denominator: of the mean: the token count of the global batch, when this is a part.
        """
        with self.taps(teacher_states, rows, weights, denominator) as session:
            self.student.forward(input_ids, attention_mask, position_ids)
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
    ) -> RepOutput:
        """Teacher and student on one batch of the student's rollouts.

        Args:
            input_ids: (B, T) int64: prompt and response.
            attention_mask: (B, T), 0 for padding, on either side; None: no padding.
            response_mask: (B, T) bool: the student's own tokens, its first EOS included.
            position_ids: (1, T) int64 of rollouts packed in one row, beginning at 0 for each; then
                attention_mask must be None. `oprd.models.packing_check.check_packing` tells whether
                a model keeps them apart.
            reading: what the teacher reads, if it isn't the same: in its own tokens, or after
                another prompt; with ``partner`` (B, T) int64, the teacher's row for each state of
                the student, or -1. `oprd.data.collate.collate` makes both: of rollouts with a
                `Reading`, such as `oprd.tokenizers.alignment.Aligner` gives.

        Raises:
            ValueError: for one of ``reading`` and ``partner`` without the other, or if ``partner``
                has not the shape of ``input_ids``.
        """
        if (reading is None) != (partner is None):
            raise ValueError(
                "reading and partner belong together: pass both of the Batch that "
                "oprd.data.collate.collate makes of rollouts with a reading, or neither"
            )
        if partner is not None and partner.shape != input_ids.shape:
            raise ValueError(
                f"partner has shape {tuple(partner.shape)} and input_ids {tuple(input_ids.shape)}: "
                "they must be equal, as in the Batch that oprd.data.collate.collate makes"
            )
        o = self.options
        chosen = supervise(
            response_mask.bool(), o.positions, o.k, o.shift, o.reduction, partner,
            position_ids_BT=position_ids,
        )  # fmt: skip
        read = reading or Batch(input_ids, attention_mask, response_mask, position_ids=position_ids)
        states = self.teacher_states(
            read.input_ids, read.attention_mask, chosen.teacher_rows, read.position_ids
        )
        return self.student_loss(
            input_ids, attention_mask, chosen.rows, states, chosen.weights, chosen.total,
            position_ids,
        )  # fmt: skip


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
    """Put OPRD's taps on a student and prepare its teacher.

    Args:
        student: a Hugging Face decoder, with or without LM head (Llama, Qwen2/3, Phi, Gemma,
            GPT-2, GPT-NeoX, ..).
        teacher: another, of the same width unless there is a bridge. It is not changed; the
            `Distiller` holds on to the part of it that is needed, so drop your reference to free
            the rest. Its parameters get no gradient.
        layers: ``"last"``, ``"all"``, ``"even"``, ``"odd"`` or a list of student blocks (0 ..).
            Layers correspond by relative depth (Eq. 11) where the depths differ.
        kind: ``"mse"`` (Eq. 6), ``"nmse"`` or ``"cosine"``.
        positions, k, shift, reduction: see `oprd.data.supervision.supervise`.
        backend: see `oprd_kernels.fused_rep_loss`.
        bridge: frozen projectors (`oprd.bridge.load_bridge`): the loss is taken between
            P_S h_S and P_T (h_T - mu_T) (Eq. 14-15), whatever the widths. The paper's kind is
            then ``"nmse"``.

    Raises:
        ValueError: if the two do not fit together, saying what would.
    """
    blocks = layers if isinstance(layers, str) else list(layers)
    options = DistillOptions(kind, blocks, positions, k, shift, reduction, backend)
    return Distiller(student, teacher, options, bridge)
